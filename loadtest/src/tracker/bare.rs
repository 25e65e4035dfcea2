//! A bare hyper server that answers 302 and nothing else: what the tracker is compared with.

use crate::local;
use crate::sink::{Line, Total};
use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::header::LOCATION;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::io::Write;
use std::net::SocketAddr;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Answer 302 to everything, for comparison
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Loopback address to listen on; port 0 is any
    #[arg(long, default_value = "127.0.0.1:0", value_parser = local::address)]
    pub listen: SocketAddr,
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
    /// End when standard input ends: for a parent that may die
    #[arg(long)]
    pub until_stdin_ends: bool,
}

/// Serves until `stop` says so, or standard input ends if asked to.
///
/// # Errors
/// When it cannot listen, or nobody reads what it prints.
pub async fn run(
    args: &Args,
    out: &mut (dyn Write + Send),
    stop: impl Future<Output = Result<()>>,
) -> Result<()> {
    let listener = TcpListener::bind(args.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr()?;
    if args.json {
        writeln!(
            out,
            "{}",
            serde_json::to_string(&Line::Listening(vec![address]))?
        )?;
    } else {
        writeln!(out, "listening on {address}")?;
    }
    out.flush()?;
    tokio::select! {
        served = serve(listener) => served,
        stopped = stop => stopped,
        () = crate::sink::end_of_input(), if args.until_stdin_ends => Ok(()),
    }?;
    if args.json {
        writeln!(
            out,
            "{}",
            serde_json::to_string(&Line::Total(Total::default()))?
        )?;
    }
    Ok(out.flush()?)
}

async fn serve(listener: TcpListener) -> Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.context("cannot accept")?;
        connections.spawn(answer(stream));
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(stream: TcpStream) {
    // Answers are one write each, as the tracker's are.
    drop(stream.set_nodelay(true));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service_fn(redirect));
    // Clients end connections as they like.
    drop(served.await);
}

async fn redirect(_: Request<Incoming>) -> Result<Response<Empty<Bytes>>, hyper::http::Error> {
    Response::builder()
        .status(StatusCode::FOUND)
        .header(LOCATION, "https://shop.example/offer/1?from=mail")
        .body(Empty::new())
}
