//! `hikyaku reclassify`: has all hits that are kept judged by the rules in force.

use serde_json::json;
use service::config::Scope;

use crate::cli::{Failure, Terminal};
use crate::reach::{Reach, runtime, told};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    reach: Reach,
}

pub(crate) fn run(arguments: &Args, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let client = arguments
        .reach
        .client(&terminal.environment, Scope::Admin)?;
    let answer = runtime()?.block_on(client.post("/v1/reclassify", &json!({})))?;
    let answer = told(&answer)?;
    writeln!(
        terminal.out,
        "History is judged anew by rules of version {}. Each verdict that changes is told by \
         engagement.reclassified.",
        answer["rules"]
    )?;
    Ok(())
}
