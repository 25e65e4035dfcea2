//! Log lines: set up once by a process, written without making anyone wait.
//!
//! Owns format, filter and the writer. Lines go to standard error: for people on a terminal, as JSON
//! otherwise, or as `HIKYAKU_LOG_FORMAT` (`text` or `json`) says; `HIKYAKU_LOG` filters (default
//! `info`). Must not be told anything a stranger wrote except through [`log_safe`].

use std::fmt;
use std::io::{self, IsTerminal as _, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::Environment;

/// Lines that wait for standard error; beyond, lines are dropped and counted, never waited for.
const WAITING_LINES: usize = 8_192;
/// What [`log_safe`] shows of a text.
const SHOWN_CHARACTERS: usize = 1_024;

/// Why logging could not be set up: the environment says something that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// `HIKYAKU_LOG` is no filter.
    #[error("HIKYAKU_LOG is not a filter (such as \"info\" or \"mta=debug,info\")")]
    Filter(#[source] tracing_subscriber::filter::ParseError),
    /// `HIKYAKU_LOG_FORMAT` is neither of the two.
    #[error("HIKYAKU_LOG_FORMAT is {0:?}: write text or json")]
    Format(String),
    /// There is a subscriber already.
    #[error("logging is set up already")]
    Again,
    /// No thread for the writer.
    #[error("no thread for writing log lines")]
    Thread(#[source] io::Error),
}

/// Sets up logging for this process. Hold what is returned until the end: dropping it writes the
/// lines that still wait.
///
/// # Errors
/// When the environment says something that makes no sense, or logging is set up already.
pub fn init(environment: &Environment) -> Result<Flush, LoggingError> {
    let filter = environment.var("HIKYAKU_LOG").unwrap_or("info");
    let filter = EnvFilter::try_new(filter).map_err(LoggingError::Filter)?;
    let for_people = match environment.var("HIKYAKU_LOG_FORMAT") {
        None => io::stderr().is_terminal(),
        Some("text") => true,
        Some("json") => false,
        Some(other) => return Err(LoggingError::Format(other.to_owned())),
    };
    let (lines, flush) = writer(io::stderr()).map_err(LoggingError::Thread)?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(lines);
    let set = if for_people {
        let colours = io::stderr().is_terminal() && environment.var("NO_COLOR").is_none();
        tracing::subscriber::set_global_default(subscriber.with_ansi(colours).finish())
    } else {
        let json = subscriber
            .json()
            .flatten_event(true)
            .with_current_span(false);
        tracing::subscriber::set_global_default(json.finish())
    };
    set.map_err(|_| LoggingError::Again)?;
    log_panics();
    Ok(flush)
}

/// A panic is a log line like any other; what prints it by default would break the JSON.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = std::backtrace::Backtrace::capture();
        let place = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        let message = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(message, place, %backtrace, "panic");
    }));
}

fn writer(to: impl Write + Send + 'static) -> io::Result<(Lines, Flush)> {
    let (send, receive) = sync_channel::<Message>(WAITING_LINES);
    let dropped = Arc::new(AtomicU64::new(0));
    let counted = dropped.clone();
    let thread = std::thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write_lines(to, &receive, &counted))?;
    let flush = Flush {
        send: send.clone(),
        thread: Some(thread),
    };
    Ok((Lines { send, dropped }, flush))
}

enum Message {
    Line(Vec<u8>),
    End,
}

fn write_lines(mut to: impl Write, lines: &Receiver<Message>, dropped: &AtomicU64) {
    while let Ok(Message::Line(line)) = lines.recv() {
        // Where standard error is gone, there is nobody left to tell.
        to.write_all(&line).ok();
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let told = format!(
                "{{\"level\":\"WARN\",\"message\":\"log lines dropped\",\"count\":{lost}}}\n"
            );
            to.write_all(told.as_bytes()).ok();
        }
    }
    to.flush().ok();
}

/// Writes what still waits when dropped.
#[derive(Debug)]
pub struct Flush {
    send: SyncSender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Line(_) => "Line",
            Self::End => "End",
        })
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        // The writer may have ended with standard error; then there is nothing to wait for.
        if self.send.send(Message::End).is_ok()
            && let Some(thread) = self.thread.take()
        {
            thread.join().ok();
        }
    }
}

/// Hands complete lines to the writing thread.
#[derive(Debug, Clone)]
struct Lines {
    send: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            lines: self,
            text: Vec::with_capacity(256),
        }
    }
}

/// One line in the making; sent when dropped.
struct Line<'a> {
    lines: &'a Lines,
    text: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let line = Message::Line(std::mem::take(&mut self.text));
        if let Err(TrySendError::Full(_)) = self.lines.send.try_send(line) {
            self.lines.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Shows text of a peer, a client or a recipient so that it can do nothing to who reads the log:
/// control and formatting characters escaped, at most 1,024 characters.
pub fn log_safe(text: &str) -> LogSafe<'_> {
    LogSafe(text)
}

/// See [`log_safe`].
#[derive(Debug, Clone, Copy)]
pub struct LogSafe<'a>(&'a str);

impl fmt::Display for LogSafe<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        let mut characters = self.0.chars();
        for character in characters.by_ref().take(SHOWN_CHARACTERS) {
            if character.is_control() || reorders(character) {
                write!(f, "{}", character.escape_unicode())?;
            } else if character == '\\' {
                // Else the text could pretend that something was escaped.
                f.write_str("\\\\")?;
            } else {
                f.write_char(character)?;
            }
        }
        match characters.next() {
            Some(_) => f.write_char('…'),
            None => Ok(()),
        }
    }
}

/// Characters without a shape of their own that hide, join or reorder what stands around them.
fn reorders(character: char) -> bool {
    matches!(
        character,
        '\u{ad}'
            | '\u{61c}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Page {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().expect("not poisoned").clone()).expect("text")
        }
    }

    impl Write for Page {
        fn write(&mut self, part: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("not poisoned").extend_from_slice(part);
            Ok(part.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn dropping_the_flush_writes_what_waits() {
        let page = Page::default();
        let (lines, flush) = writer(page.clone()).expect("a thread");
        for number in 0..100 {
            writeln!(lines.make_writer(), "{number}").expect("memory");
        }
        drop(flush);
        let expected: String = (0..100).map(|number| format!("{number}\n")).collect();
        assert_eq!(page.text(), expected);
        // A task that outlives the flush must neither wait nor fail.
        writeln!(lines.make_writer(), "late").expect("memory");
    }

    #[test]
    fn a_standard_error_that_nobody_reads_holds_nobody_up() {
        struct Stuck(Receiver<()>, Page);
        impl Write for Stuck {
            fn write(&mut self, part: &[u8]) -> io::Result<usize> {
                self.0.recv().ok();
                self.1.write(part)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (release, held) = sync_channel::<()>(0);
        let page = Page::default();
        let (lines, flush) = writer(Stuck(held, page.clone())).expect("a thread");
        for _ in 0..WAITING_LINES + 50 {
            writeln!(lines.make_writer(), "x").expect("memory");
        }
        drop(release);
        drop(flush);
        let written = page.text().lines().filter(|line| *line == "x").count();
        let told = page
            .text()
            .lines()
            .find(|line| line.contains("dropped"))
            .map(str::to_owned);
        let lost = WAITING_LINES + 50 - written;
        assert!(lost >= 49, "{lost}");
        assert!(told.is_some_and(|line| line.contains(&format!("\"count\":{lost}"))));
    }

    #[test]
    fn text_of_strangers_is_shown_without_effect() {
        let shown = |text: &str| log_safe(text).to_string();
        assert_eq!(shown("550 5.1.1 無効な宛先"), "550 5.1.1 無効な宛先");
        assert_eq!(shown("ok\r\nINFO forged"), "ok\\u{d}\\u{a}INFO forged");
        assert_eq!(shown("\u{1b}[2J\u{202e}a\\n"), "\\u{1b}[2J\\u{202e}a\\\\n");
        assert_eq!(
            shown(&"x".repeat(2_000)).chars().count(),
            SHOWN_CHARACTERS + 1
        );
    }

    proptest! {
        #[test]
        fn no_text_reaches_the_log_with_a_control_character(text: String) {
            let shown = log_safe(&text).to_string();
            prop_assert!(!shown.chars().any(|c| c.is_control() || reorders(c)));
        }
    }
}
