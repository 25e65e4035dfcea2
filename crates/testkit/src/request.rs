//! One HTTP/1.1 request, read from a stream: what the servers of this crate have in common.
//!
//! `Content-Length` bodies only; bounded. Must not answer.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The longest head and body of a request.
const HEAD_MAX: usize = 16 << 10;
const BODY_MAX: usize = 16 << 20;

/// A request as it came.
pub(crate) struct Request {
    pub(crate) method: String,
    /// With its query.
    pub(crate) path: String,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// The value of a header, by its name in lower case; empty: there is none.
    pub(crate) fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map_or("", |(_, value)| value)
    }

    pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut bytes = Vec::new();
        let end = loop {
            if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            if bytes.len() > HEAD_MAX || stream.read_buf(&mut bytes).await? == 0 {
                return Err(too_much());
            }
        };
        let body = bytes.split_off(end);
        let mut request = Self::of_head(&String::from_utf8_lossy(&bytes));
        let length = request.header("content-length").parse().unwrap_or(0);
        request.body = read_body(stream, body, length).await?;
        Ok(request)
    }

    fn of_head(head: &str) -> Self {
        let mut words = head.lines().next().unwrap_or_default().split(' ');
        let mut word = || words.next().unwrap_or_default().to_owned();
        let fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
        Self {
            method: word(),
            path: word(),
            headers: fields
                .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
                .collect(),
            body: Vec::new(),
        }
    }
}

async fn read_body(
    stream: &mut (impl AsyncRead + Unpin),
    mut body: Vec<u8>,
    length: usize,
) -> io::Result<Vec<u8>> {
    if length > BODY_MAX {
        return Err(too_much());
    }
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            return Err(too_much());
        }
    }
    Ok(body)
}

fn too_much() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not a request, or too long")
}
