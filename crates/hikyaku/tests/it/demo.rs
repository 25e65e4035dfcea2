//! The demo is a test: its exit status says whether the report is true.

use anyhow::Result;
use std::process::Command;

#[test]
fn the_demos_report_is_true_to_the_message() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let output = Command::new(env!("CARGO_BIN_EXE_hikyaku"))
        .args(["demo", "--exit"])
        .current_dir(&dir)
        .output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{}:\n{text}", output.status);
    for part in [
        "delivery rate",
        "people who clicked",
        "unsubscribed",
        "1000",
    ] {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
    Ok(())
}
