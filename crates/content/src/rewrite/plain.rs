//! URLs in plain text.
//!
//! Owns where a URL begins and ends between words. Must not judge whether it is tracked.

use std::ops::Range;

/// The URLs in plain text: from `http://` or `https://` to white space, a quote, an angle bracket
/// or what is not ASCII, less the punctuation of the sentence around it.
pub(super) fn text_urls(masked: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) =
        memchr::memmem::find(masked.get(from..).unwrap_or_default(), b"://").map(|at| from + at)
    {
        let head = masked.get(..at).unwrap_or_default();
        let letters = head
            .iter()
            .rev()
            .take_while(|b| b.is_ascii_alphanumeric())
            .count();
        let scheme = head
            .get(at - letters..)
            .unwrap_or_default()
            .to_ascii_lowercase();
        let rest = masked.get(at + 3..).unwrap_or_default();
        let ends = |b: &u8| !b.is_ascii_graphic() || matches!(b, b'<' | b'>' | b'"' | b'\'' | b'`');
        let len = rest.iter().position(ends).unwrap_or(rest.len());
        from = at + 3 + len;
        if matches!(scheme.as_slice(), b"http" | b"https") {
            let start = at - letters;
            let end = trim_sentence(masked, start, from);
            if end > at + 3 {
                found.push(start..end);
            }
        }
    }
    found
}

fn trim_sentence(masked: &[u8], start: usize, mut end: usize) -> usize {
    while let Some(url) = masked.get(start..end) {
        let count = |byte: u8| url.iter().filter(|&&b| b == byte).count();
        let surplus = match url.last() {
            Some(b'.' | b',' | b';' | b':' | b'!' | b'?' | b'*' | b'_') => true,
            Some(b')') => count(b')') > count(b'('),
            Some(b']') => count(b']') > count(b'['),
            Some(b'}') => count(b'}') > count(b'{'),
            _ => false,
        };
        if !surplus {
            break;
        }
        end -= 1;
    }
    end
}
