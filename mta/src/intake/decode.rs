//! Bodies as they were before their callers compressed them.
//!
//! Owns `Content-Encoding`. A body is decoded piece by piece, on demand, so that whoever counts its
//! bytes stops a bomb where the limit is; the decoders' own memory is bounded. Must not judge what
//! is in the body.

use std::io;

use async_compression::tokio::bufread::{GzipDecoder, ZstdDecoder};
use async_compression::zstd::DParameter;
use axum::body::Body;
use axum::http::{HeaderMap, header};
use futures_util::TryStreamExt as _;
use tokio::io::AsyncRead;
use tokio_util::io::{ReaderStream, StreamReader};

use crate::admin::problem::{Answer, Code, Refusal};

/// The largest window of a zstd frame: 8 MiB, which senders keep to (RFC 9659 §3).
const WINDOW_LOG_MAX: u32 = 23;
/// Bytes decoded at a time.
const PIECE: usize = 64 << 10;

/// How a body was compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Identity,
    Gzip,
    Zstd,
}

impl Encoding {
    /// As the headers say (RFC 9110 §8.4).
    ///
    /// # Errors
    /// [`Code::UnsupportedMedia`]: none that is taken, or several on top of each other.
    pub(crate) fn of(headers: &HeaderMap) -> Answer<Self> {
        let Some(value) = headers.get(header::CONTENT_ENCODING) else {
            return Ok(Self::Identity);
        };
        let name = value.to_str().unwrap_or("?").trim().to_ascii_lowercase();
        match name.as_str() {
            "" | "identity" => Ok(Self::Identity),
            "gzip" | "x-gzip" => Ok(Self::Gzip),
            "zstd" => Ok(Self::Zstd),
            other => {
                let detail = format!("the content encoding is {other:.40?}, expected gzip or zstd");
                Err(Refusal::new(Code::UnsupportedMedia, detail))
            }
        }
    }

    /// The body as it was before. What is broken in it shows as an error of the body.
    pub(crate) fn decode(self, body: Body) -> Body {
        let bytes =
            |body: Body| StreamReader::new(body.into_data_stream().map_err(io::Error::other));
        match self {
            Self::Identity => body,
            Self::Gzip => {
                let mut decoder = GzipDecoder::new(bytes(body));
                decoder.multiple_members(true);
                streamed(decoder)
            }
            Self::Zstd => {
                let window = DParameter::window_log_max(WINDOW_LOG_MAX);
                let mut decoder = ZstdDecoder::with_params(bytes(body), &[window]);
                decoder.multiple_members(true);
                streamed(decoder)
            }
        }
    }
}

fn streamed(decoder: impl AsyncRead + Send + 'static) -> Body {
    Body::from_stream(ReaderStream::with_capacity(decoder, PIECE))
}
