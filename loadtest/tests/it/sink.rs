//! The sink as a process of its own.

use anyhow::{Result, ensure};
use loadtest::counterpart::Counterpart;
use loadtest::process;
use std::net::SocketAddr;
use std::path::Path;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// Sends so many messages over one connection, as simply as SMTP can be spoken.
async fn send(to: SocketAddr, messages: usize) -> Result<()> {
    let mut stream = BufReader::new(TcpStream::connect(to).await?);
    let mut say = async |line: &str, code: &str| {
        stream.write_all(line.as_bytes()).await?;
        loop {
            let mut reply = String::new();
            stream.read_line(&mut reply).await?;
            ensure!(reply.starts_with(code), "{line:?} was answered {reply:?}");
            if reply.as_bytes().get(3) == Some(&b' ') {
                return Ok(());
            }
        }
    };
    say("", "220").await?;
    say("EHLO source.example\r\n", "250").await?;
    for _ in 0..messages {
        say("MAIL FROM:<a@brand.example>\r\n", "250").await?;
        say("RCPT TO:<b@x.example>\r\n", "250").await?;
        say("DATA\r\n", "354").await?;
        say("Subject: x\r\n\r\nhello\r\n.\r\n", "250").await?;
    }
    say("QUIT\r\n", "221").await
}

#[tokio::test]
async fn a_sink_in_a_process_of_its_own_counts_and_ends_with_its_parent() -> Result<()> {
    let program = Path::new(env!("CARGO_BIN_EXE_loadtest"));
    let sink = Counterpart::start_of(program, "sink", &[]).await?;
    let pid = sink.pid();
    let (first, second) = tokio::join!(send(sink.address(), 3), send(sink.address(), 2));
    first?;
    second?;
    let usage = process::usage(pid)?;
    assert!(usage.threads.values().any(|threads| threads.count > 0));
    assert!(process::peak_memory(pid)? > 0);
    let total = sink.stop().await?;
    assert_eq!(
        (total.messages, total.recipients, total.connections),
        (5, 5, 2)
    );
    assert_eq!(total.bytes, 5 * "Subject: x\r\n\r\nhello\r\n".len() as u64);
    assert!(process::usage(pid).is_err(), "it has ended");
    Ok(())
}

#[tokio::test]
async fn a_sink_ends_after_so_many_messages() -> Result<()> {
    let mut out = Vec::new();
    let args = loadtest::sink::Args {
        listen: "127.0.0.1:0".parse()?,
        listeners: 2,
        manner: loadtest::sink::Manner::default(),
        messages: Some(4),
        json: true,
        until_stdin_ends: false,
    };
    // The addresses are printed before anything can come, and the totals when all has.
    let (told, tell) = tokio::io::duplex(4096);
    let mut both = Both(&mut out, Some(tell));
    let sink = loadtest::sink::run(&args, &mut both, std::future::pending());
    let source = async {
        let mut line = String::new();
        BufReader::new(told).read_line(&mut line).await?;
        let loadtest::sink::Line::Listening(addresses) = serde_json::from_str(&line)? else {
            anyhow::bail!("{line}");
        };
        ensure!(addresses.len() == 2, "{line}");
        for address in addresses {
            send(address, 2).await?;
        }
        Ok(())
    };
    let (total, sent) = tokio::join!(sink, source);
    sent?;
    assert_eq!(total?.messages, 4);
    let text = String::from_utf8(out)?;
    assert_eq!(text.lines().count(), 2, "{text}");
    Ok(())
}

/// What is printed, kept and passed on.
struct Both<'a>(&'a mut Vec<u8>, Option<tokio::io::DuplexStream>);

impl std::io::Write for Both<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.extend_from_slice(bytes);
        if let Some(tell) = self.1.as_mut() {
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            let write = std::pin::Pin::new(tell);
            // There is room for a line; who has read the first one reads no more.
            drop(tokio::io::AsyncWrite::poll_write(
                write,
                &mut context,
                bytes,
            ));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
