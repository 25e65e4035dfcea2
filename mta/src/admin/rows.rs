//! Lists that may be had whole: rows as lines or as a table, or a page of them in JSON.
//!
//! Owns what `Accept` asks for and how rows are written. A whole list is streamed, a page of the
//! store at a time: memory does not grow with it. Must not know what the rows are.

use std::io;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use serde::Serialize;

/// How the caller wants them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// A page in JSON, with a cursor.
    Page,
    /// All of them.
    Whole(Table),
}

/// How a whole list is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    Ndjson,
    Csv,
}

impl Form {
    /// The first known type in `Accept`, which is how people write it.
    pub(super) fn wanted(headers: &HeaderMap) -> Self {
        let accept = headers
            .get(header::ACCEPT)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let known = accept.split(',').find_map(|part| {
            match part.split(';').next().unwrap_or_default().trim() {
                "application/json" | "*/*" | "application/*" => Some(Self::Page),
                "application/x-ndjson" => Some(Self::Whole(Table::Ndjson)),
                "text/csv" => Some(Self::Whole(Table::Csv)),
                _ => None,
            }
        });
        known.unwrap_or(Self::Page)
    }
}

impl Table {
    fn media_type(self) -> &'static str {
        match self {
            Self::Ndjson => "application/x-ndjson",
            Self::Csv => "text/csv; charset=utf-8",
        }
    }

    /// Writes one page; the `first` has the names of the columns.
    fn write<T: Serialize>(self, rows: &[T], first: bool) -> io::Result<Vec<u8>> {
        match self {
            Self::Ndjson => ndjson(rows),
            Self::Csv => csv(rows, first),
        }
    }
}

/// All rows from `start` on, page by page: `page` answers the rows at a place and where to go on
/// (none: these were the last). An error on the way cuts the connection, so that nobody takes a part
/// for the whole.
pub(super) fn whole<T, P, E, F>(
    table: Table,
    start: P,
    page: impl Fn(P) -> F + Send + 'static,
) -> Response
where
    T: Serialize + Send,
    P: Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
    F: Future<Output = Result<(Vec<T>, Option<P>), E>> + Send + 'static,
{
    let pages = stream::try_unfold((Some(start), true), move |(place, first)| {
        let asked = place.map(&page);
        async move {
            let Some(asked) = asked else {
                return Ok(None);
            };
            let (rows, next) = asked.await.map_err(io::Error::other)?;
            let bytes = table.write(&rows, first)?;
            Ok::<_, io::Error>(Some((Bytes::from(bytes), (next, false))))
        }
    });
    let media = HeaderValue::from_static(table.media_type());
    let mut response = Body::from_stream(pages).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, media);
    response
}

fn ndjson<T: Serialize>(rows: &[T]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut out, row)?;
        out.push(b'\n');
    }
    Ok(out)
}

fn csv<T: Serialize>(rows: &[T], first: bool) -> io::Result<Vec<u8>> {
    let mut writer = csv::WriterBuilder::new()
        .has_headers(first)
        .from_writer(Vec::new());
    for row in rows {
        writer.serialize(row)?;
    }
    writer.into_inner().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_follows_accept() {
        for (accept, form) in [
            ("", Form::Page),
            ("text/html, */*;q=0.8", Form::Page),
            ("application/x-ndjson", Form::Whole(Table::Ndjson)),
            ("text/csv; q=0.9, application/json", Form::Whole(Table::Csv)),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            assert_eq!(Form::wanted(&headers), form, "{accept}");
        }
    }

    #[derive(Serialize)]
    struct Number {
        of: u32,
    }

    async fn read(table: Table, fails_at: u32) -> Result<String, String> {
        let response = whole(table, 0, move |at| async move {
            let rows = vec![Number { of: at }, Number { of: at + 1 }];
            let next = (at < 4).then_some(at + 2);
            if at == fails_at {
                Err("away")
            } else {
                Ok((rows, next))
            }
        });
        let read = axum::body::to_bytes(response.into_body(), 1 << 10).await;
        let bytes = read.map_err(|error| error.to_string())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    #[tokio::test]
    async fn pages_make_one_table_with_one_head() {
        let csv = read(Table::Csv, u32::MAX).await;
        assert_eq!(csv.as_deref(), Ok("of\n0\n1\n2\n3\n4\n5\n"));
        let lines = read(Table::Ndjson, u32::MAX).await.expect("all of it");
        assert_eq!(lines.lines().count(), 6);
        assert!(lines.ends_with("{\"of\":5}\n"));
    }

    #[tokio::test]
    async fn a_part_is_never_taken_for_the_whole() {
        let cut = read(Table::Ndjson, 4).await;
        assert!(cut.is_err_and(|why| why.contains("away")));
    }
}
