//! Bodies: transfer encodings and the parts of a message (RFC 2045, RFC 2046).
//!
//! Owns the choice of encoding and the guarantee of the wire: ASCII only, lines of at most 998
//! octets, no bare CR or LF, no NUL. Text comes in with CRLF line ends ([`crate::sink`] sees to it).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use memchr::memmem;

use crate::spec::ReportPart;

/// The hard limit of RFC 5322 §2.1.1, without CRLF.
const LONGEST_LINE: usize = 998;
/// RFC 2045 §6.7 (5) and §6.8.
const ENCODED_LINE: usize = 76;
/// Every boundary begins so, and no encoded body can contain it (RFC 2045 §6.7 recommends `=_`).
const BOUNDARY_START: &str = "--=_";

/// The field that makes a message one of MIME.
pub(crate) const VERSION: &str = "MIME-Version: 1.0\r\n";

/// How a body travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    SevenBit,
    QuotedPrintable,
    Base64,
}

impl Encoding {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::SevenBit => "7bit",
            Self::QuotedPrintable => "quoted-printable",
            Self::Base64 => "base64",
        }
    }

    /// Plain where that is safe, else the shorter of the other two.
    pub(crate) fn choose(text: &[u8]) -> Self {
        if is_plain(text) {
            return Self::SevenBit;
        }
        let escaped = text.iter().filter(|&&b| must_escape(b)).count();
        let quoted = (text.len() + 2 * escaped) * 78 / 75;
        let base64 = text.len().div_ceil(3) * 4 * 78 / 76;
        if quoted <= base64 {
            Self::QuotedPrintable
        } else {
            Self::Base64
        }
    }

    /// Appends `text` encoded; it ends in CRLF only if the text does.
    pub(crate) fn write(self, out: &mut Vec<u8>, text: &[u8]) {
        match self {
            Self::SevenBit => out.extend_from_slice(text),
            Self::QuotedPrintable => quoted_printable(out, text),
            Self::Base64 => base64_lines(out, text),
        }
    }
}

/// Whether `text` may travel as it is: no relay, mailbox format or parser has a reason to touch it.
fn is_plain(text: &[u8]) -> bool {
    // Folded without a branch, so that it runs over many bytes at once.
    let strange = text.iter().fold(false, |strange, &b| {
        strange | !(b.is_ascii() && b != 0x7f && (b >= b' ' || matches!(b, b'\t' | b'\r' | b'\n')))
    });
    if strange {
        return false;
    }
    let mut start = 0;
    for end in memchr::memchr_iter(b'\n', text)
        .map(|at| at + 1)
        .chain([text.len()])
    {
        let line = text.get(start..end).unwrap_or_default();
        let line = line.strip_suffix(b"\r\n").unwrap_or(line);
        // Mailbox formats change a `From ` at the start of a line.
        if line.starts_with(b"From ") || line.len() > LONGEST_LINE {
            return false;
        }
        start = end;
    }
    // Some parsers take a boundary in the middle of a line, too.
    if memmem::find(text, BOUNDARY_START.as_bytes()).is_some() {
        return false;
    }
    // White space at the very end is the one thing that verifiers are known to disagree about.
    let end = text.iter().rposition(|b| !matches!(b, b'\r' | b'\n'));
    end.and_then(|at| text.get(at))
        .is_none_or(|b| !matches!(b, b' ' | b'\t'))
}

fn must_escape(byte: u8) -> bool {
    !(matches!(byte, b' '..=b'~' | b'\t' | b'\r' | b'\n') && byte != b'=')
}

fn quoted_printable(out: &mut Vec<u8>, text: &[u8]) {
    quoted(out, text, false);
}

/// As [`quoted_printable`], for a part whose boundary somebody else chose: no line begins with `--`,
/// so none that is broken can become a delimiter.
pub(crate) fn quoted_printable_in_part(out: &mut Vec<u8>, text: &[u8]) {
    quoted(out, text, true);
}

fn quoted(out: &mut Vec<u8>, text: &[u8], is_guarded: bool) {
    out.reserve(text.len() + text.len() / 8 + 16);
    let mut start = 0;
    for end in memmem::find_iter(text, b"\r\n") {
        quoted_line(out, text.get(start..end).unwrap_or_default(), is_guarded);
        out.extend_from_slice(b"\r\n");
        start = end + 2;
    }
    quoted_line(out, text.get(start..).unwrap_or_default(), is_guarded);
}

fn quoted_line(out: &mut Vec<u8>, line: &[u8], is_guarded: bool) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut column = 0;
    let last = line.len().wrapping_sub(1);
    let from = line.starts_with(b"From ");
    for (at, &byte) in line.iter().enumerate() {
        let mut escape = must_escape(byte)
            || matches!(byte, b'\r' | b'\n')
            || (at == last && matches!(byte, b' ' | b'\t'))
            || (at == 0 && from);
        // One column stays free for the `=` of a soft line break.
        if column + if escape { 3 } else { 1 } > ENCODED_LINE - 1 {
            out.extend_from_slice(b"=\r\n");
            column = 0;
        }
        escape |= is_guarded
            && column == 0
            && byte == b'-'
            && line.get(at + 1).is_some_and(|b| *b == b'-');
        let width = if escape { 3 } else { 1 };
        if escape {
            out.extend([
                b'=',
                HEX[usize::from(byte >> 4)],
                HEX[usize::from(byte & 15)],
            ]);
        } else {
            out.push(byte);
        }
        column += width;
    }
}

pub(crate) fn base64_lines(out: &mut Vec<u8>, text: &[u8]) {
    let mut line = [0_u8; ENCODED_LINE];
    for (at, chunk) in text.chunks(ENCODED_LINE / 4 * 3).enumerate() {
        if at > 0 {
            out.extend_from_slice(b"\r\n");
        }
        // The buffer holds exactly what a chunk becomes.
        let len = STANDARD.encode_slice(chunk, &mut line).unwrap_or(0);
        out.extend_from_slice(line.get(..len).unwrap_or_default());
    }
}

/// One text part.
pub(crate) struct Part<'a> {
    /// `text/plain` or `text/html`.
    pub(crate) media_type: &'static str,
    /// With CRLF line ends.
    pub(crate) text: &'a [u8],
}

/// Writes the MIME fields into `headers` and the encoded parts into `body`: one part alone, or
/// several as `multipart/alternative`, plainest first. `id` makes the boundary, so the same message
/// has the same bytes each time.
pub(crate) fn write(headers: &mut Vec<u8>, body: &mut Vec<u8>, id: &str, parts: &[Part<'_>]) {
    headers.extend_from_slice(VERSION.as_bytes());
    if let [part] = parts {
        let encoding = Encoding::choose(part.text);
        part_header(headers, part, encoding);
        encoding.write(body, part.text);
        if !body.ends_with(b"\r\n") {
            body.extend_from_slice(b"\r\n");
        }
        return;
    }
    for piece in [
        "Content-Type: multipart/alternative;\r\n boundary=\"",
        boundary(),
        id,
        "\"\r\n",
    ] {
        headers.extend_from_slice(piece.as_bytes());
    }
    for part in parts {
        delimiter(body, id, "\r\n");
        let encoding = Encoding::choose(part.text);
        part_header(body, part, encoding);
        body.extend_from_slice(b"\r\n");
        encoding.write(body, part.text);
        // The line break before a delimiter belongs to it, not to the part (RFC 2046 §5.1.1).
        body.extend_from_slice(b"\r\n");
    }
    delimiter(body, id, "--\r\n");
}

/// Writes a `multipart/report` (RFC 6522): `text` for people, then the report.
pub(crate) fn write_report(
    headers: &mut Vec<u8>,
    body: &mut Vec<u8>,
    id: &str,
    text: &Part<'_>,
    report: &ReportPart,
) {
    for piece in [
        "MIME-Version: 1.0\r\nContent-Type: multipart/report; report-type=",
        &report.report_type,
        ";\r\n boundary=\"",
        boundary(),
        id,
        "\"\r\n",
    ] {
        headers.extend_from_slice(piece.as_bytes());
    }
    delimiter(body, id, "\r\n");
    let encoding = Encoding::choose(text.text);
    part_header(body, text, encoding);
    body.extend_from_slice(b"\r\n");
    encoding.write(body, text.text);
    body.extend_from_slice(b"\r\n");
    delimiter(body, id, "\r\n");
    for piece in [
        "Content-Type: ",
        &report.media_type,
        "\r\nContent-Transfer-Encoding: base64\r\nContent-Disposition: attachment;\r\n filename=\"",
        &report.file_name,
        "\"\r\n\r\n",
    ] {
        body.extend_from_slice(piece.as_bytes());
    }
    for line in report.data.as_bytes().chunks(ENCODED_LINE) {
        body.extend_from_slice(line);
        body.extend_from_slice(b"\r\n");
    }
    delimiter(body, id, "--\r\n");
}

/// The boundary without its two hyphens and without the id.
pub(crate) fn boundary() -> &'static str {
    BOUNDARY_START.trim_start_matches('-')
}

fn delimiter(body: &mut Vec<u8>, id: &str, end: &str) {
    for piece in [BOUNDARY_START, id, end] {
        body.extend_from_slice(piece.as_bytes());
    }
}

fn part_header(out: &mut Vec<u8>, part: &Part<'_>, encoding: Encoding) {
    for piece in [
        "Content-Type: ",
        part.media_type,
        "; charset=utf-8\r\nContent-Transfer-Encoding: ",
        encoding.name(),
        "\r\n",
    ] {
        out.extend_from_slice(piece.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mail_parser::MessageParser;
    use proptest::prelude::*;

    #[test]
    fn the_encoding_fits_the_text() {
        let long = "x".repeat(998);
        let cases: [(&str, Encoding); 13] = [
            ("", Encoding::SevenBit),
            ("hello\r\n", Encoding::SevenBit),
            (&long, Encoding::SevenBit),
            ("<p>\r\n  a  \r\n</p>", Encoding::SevenBit),
            (&format!("{long}x"), Encoding::QuotedPrintable),
            ("From here\r\n", Encoding::QuotedPrintable),
            ("a\r\nFrom here\r\n", Encoding::QuotedPrintable),
            ("a --=_01J.1\r\n", Encoding::QuotedPrintable),
            ("a\r\n \r\n", Encoding::QuotedPrintable),
            ("a ", Encoding::QuotedPrintable),
            ("a\0b", Encoding::Base64),
            (
                "Grüße aus Köln, wo heute die Sonne scheint\r\n",
                Encoding::QuotedPrintable,
            ),
            ("日本語のメール\r\n", Encoding::Base64),
        ];
        for (text, encoding) in cases {
            assert_eq!(Encoding::choose(text.as_bytes()), encoding, "{text:?}");
        }
    }

    #[test]
    fn quoted_printable_by_the_book() {
        let mut out = Vec::new();
        quoted_printable(&mut out, "a=b \r\n\té \r\nFrom x\r\n\r\nend".as_bytes());
        assert_eq!(
            String::from_utf8_lossy(&out),
            "a=3Db=20\r\n\t=C3=A9=20\r\n=46rom x\r\n\r\nend"
        );
        out.clear();
        quoted_printable(&mut out, &[b'x'; 76]);
        assert_eq!(
            String::from_utf8_lossy(&out),
            format!("{}=\r\nx", "x".repeat(75))
        );
    }

    fn message(parts: &[Part<'_>]) -> (Vec<u8>, Vec<u8>) {
        let (mut message, mut body) = (Vec::new(), Vec::new());
        write(&mut message, &mut body, "01JD.7", parts);
        message.extend_from_slice(b"\r\n");
        message.extend_from_slice(&body);
        (message, body)
    }

    fn wire_is_sound(message: &[u8], longest: usize) -> Result<(), TestCaseError> {
        let text = std::str::from_utf8(message).expect("ASCII is UTF-8");
        prop_assert!(text.is_ascii() && text.ends_with("\r\n"));
        for line in text.split("\r\n") {
            prop_assert!(
                line.len() <= longest && !line.contains(['\r', '\n', '\0']),
                "{line:?}"
            );
        }
        Ok(())
    }

    fn crlf(text: &str) -> String {
        text.replace("\r\n", "\n")
            .replace('\r', "\n")
            .replace('\n', "\r\n")
    }

    proptest! {
        #[test]
        fn both_parts_survive(
            text in "(\\PC|[ \t\r\n=é日]|--=_01JD\\.7|From |[a-z]{400}){0,80}",
            html in "(\\PC|[ \t\r\n=<>]|--=_01JD\\.7--|\r\n\\.|\x00){0,80}",
        ) {
            let (text, html) = (crlf(&text), crlf(&html));
            let parts = [
                Part { media_type: "text/plain", text: text.as_bytes() },
                Part { media_type: "text/html", text: html.as_bytes() },
            ];
            let (message, _) = message(&parts);
            wire_is_sound(&message, LONGEST_LINE)?;
            let parsed = MessageParser::new().parse(&message).expect("a message");
            prop_assert_eq!(parsed.parts.len(), 3);
            prop_assert_eq!(parsed.parts[1].text_contents(), Some(text.as_str()));
            prop_assert_eq!(parsed.parts[2].text_contents(), Some(html.as_str()));
        }

        #[test]
        fn one_part_survives(text in "(\\PC|[ \t\r\n=é日]|[a-z]{400}){0,80}") {
            let text = crlf(&text);
            let (message, _) = message(&[Part { media_type: "text/plain", text: text.as_bytes() }]);
            wire_is_sound(&message, LONGEST_LINE)?;
            let parsed = MessageParser::new().parse(&message).expect("a message");
            let read = parsed.parts[0].text_contents().expect("text");
            // A plain body ends in a line break on the wire, whether the text did or not.
            prop_assert_eq!(read.trim_end_matches("\r\n"), text.trim_end_matches("\r\n"));
        }

        #[test]
        fn every_encoding_gives_the_text_back(text in "(\\PC|[ \t=é日]|\r\n|From |[a-z]{60,90}){0,60}") {
            for encoding in [Encoding::QuotedPrintable, Encoding::Base64] {
                let mut out = Vec::new();
                encoding.write(&mut out, text.as_bytes());
                out.extend_from_slice(b"\r\n");
                wire_is_sound(&out, ENCODED_LINE)?;
                out.truncate(out.len() - 2);
                let message = format!(
                    "MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: {}\r\n\r\n{}",
                    encoding.name(), String::from_utf8_lossy(&out)
                );
                let parsed = MessageParser::new().parse(message.as_bytes()).expect("a message");
                prop_assert_eq!(parsed.parts[0].text_contents(), Some(text.as_str()));
            }
        }
    }
}
