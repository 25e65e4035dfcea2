//! Attachments: files beside the text (`multipart/mixed`), and those that the HTML shows
//! (`multipart/related`, RFC 2387), encoded once per batch.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::mime;
use crate::spec::Attachment;

const NAME_MAX: usize = 200;
const ID_MAX: usize = 200;

/// Files ready to be written into messages.
#[derive(Debug, Default)]
pub(crate) struct Attached {
    /// Shown by the HTML: whole parts.
    inline: Vec<Vec<u8>>,
    /// Beside the text.
    files: Vec<Vec<u8>>,
}

impl Attached {
    /// Encodes files; `wrong` is told what is wrong, by number.
    pub(crate) fn read(all: &[Attachment], mut wrong: impl FnMut(usize, &str, String)) -> Self {
        let mut attached = Self::default();
        let mut seen: Vec<&str> = Vec::new();
        for (number, one) in all.iter().enumerate() {
            if one.filename.is_empty()
                || one.filename.len() > NAME_MAX
                || one.filename.chars().any(char::is_control)
            {
                let detail = format!("is not 1 to {NAME_MAX} bytes without control characters");
                wrong(number, "filename", detail);
            }
            if !is_media_type(&one.media_type) {
                wrong(
                    number,
                    "type",
                    "is not a media type such as image/png".to_owned(),
                );
            }
            if let Some(id) = &one.content_id {
                let plain = |byte: u8| byte.is_ascii_graphic() && !b"<>\"\\()".contains(&byte);
                if id.is_empty() || id.len() > ID_MAX || !id.bytes().all(plain) {
                    wrong(
                        number,
                        "content_id",
                        "is not the inside of a Content-ID".to_owned(),
                    );
                } else if seen.contains(&id.as_str()) {
                    wrong(number, "content_id", "is there twice".to_owned());
                }
                seen.push(id);
            }
            let packed: String = one
                .content
                .chars()
                .filter(|c| !c.is_ascii_whitespace())
                .collect();
            match STANDARD.decode(packed) {
                Ok(bytes) if one.content_id.is_some() => attached.inline.push(part(one, &bytes)),
                Ok(bytes) => attached.files.push(part(one, &bytes)),
                Err(error) => wrong(number, "content", format!("is not base64: {error}")),
            }
        }
        attached
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.inline.is_empty() && self.files.is_empty()
    }

    /// Writes the MIME fields and the body of a message: `parts` with the files around them.
    pub(crate) fn write(
        &self,
        headers: &mut Vec<u8>,
        body: &mut Vec<u8>,
        id: &str,
        parts: &[mime::Part<'_>],
    ) {
        headers.extend_from_slice(mime::VERSION.as_bytes());
        let (mut inner_headers, mut inner) = (Vec::new(), Vec::new());
        mime::write(&mut inner_headers, &mut inner, id, parts);
        // The version stands at the top alone.
        let mut fields = inner_headers.split_off(mime::VERSION.len().min(inner_headers.len()));
        // No boundary may begin with another one.
        for (kind, mark, files) in [("related", "r", &self.inline), ("mixed", "m", &self.files)] {
            if files.is_empty() {
                continue;
            }
            let boundary = format!("{}{mark}.{id}", mime::boundary());
            let mut outer =
                Vec::with_capacity(inner.len() + files.iter().map(Vec::len).sum::<usize>());
            for part in std::iter::once([&fields[..], b"\r\n", &inner].concat())
                .chain(files.iter().cloned())
            {
                outer.extend_from_slice(format!("--{boundary}\r\n").as_bytes());
                outer.extend_from_slice(&part);
                if !part.ends_with(b"\r\n") {
                    outer.extend_from_slice(b"\r\n");
                }
            }
            outer.extend_from_slice(format!("--{boundary}--\r\n").as_bytes());
            fields = format!("Content-Type: multipart/{kind};\r\n boundary=\"{boundary}\"\r\n")
                .into_bytes();
            inner = outer;
        }
        headers.extend_from_slice(&fields);
        body.extend_from_slice(&inner);
    }
}

/// One file as a part, fields and all.
fn part(of: &Attachment, bytes: &[u8]) -> Vec<u8> {
    let disposition = if of.content_id.is_some() {
        "inline"
    } else {
        "attachment"
    };
    let mut out = format!(
        "Content-Type: {}\r\nContent-Transfer-Encoding: base64\r\nContent-Disposition: {disposition};\r\n {}\r\n",
        of.media_type,
        file_name(&of.filename)
    )
    .into_bytes();
    if let Some(id) = &of.content_id {
        out.extend_from_slice(format!("Content-ID: <{id}>\r\n").as_bytes());
    }
    out.extend_from_slice(b"\r\n");
    mime::base64_lines(&mut out, bytes);
    out
}

/// The file name as a parameter: as it is, or as RFC 2231 has it.
fn file_name(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b" ._-()+,".contains(&byte);
    if name.bytes().all(plain) && name.len() <= 60 {
        return format!("filename=\"{name}\"");
    }
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let mut pieces = vec![String::new()];
    for letter in name.chars() {
        // A line of a header has room for so much; readers decode each line alone, so that none
        // may end within a letter.
        if pieces.last().is_none_or(|piece| piece.len() > 40) {
            pieces.push(String::new());
        }
        let Some(piece) = pieces.last_mut() else {
            continue;
        };
        for byte in letter.encode_utf8(&mut [0; 4]).bytes() {
            match unreserved(byte) {
                true => piece.push(char::from(byte)),
                false => piece.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    let named = pieces.iter().enumerate().map(|(number, piece)| {
        let charset = if number == 0 { "utf-8''" } else { "" };
        format!("filename*{number}*={charset}{piece}")
    });
    named.collect::<Vec<_>>().join(";\r\n ")
}

fn is_media_type(text: &str) -> bool {
    let token = |part: &str| {
        !part.is_empty()
            && part.len() <= 100
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&byte))
    };
    text.split_once('/')
        .is_some_and(|(kind, of)| token(kind) && token(of))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mail_parser::{MessageParser, MimeHeaders as _};
    use proptest::prelude::*;

    fn file(name: &str, content: &[u8], id: Option<&str>) -> Attachment {
        Attachment {
            filename: name.to_owned(),
            media_type: "image/png".to_owned(),
            content: STANDARD.encode(content),
            content_id: id.map(str::to_owned),
        }
    }

    fn message(files: &[Attachment]) -> Vec<u8> {
        let attached = Attached::read(files, |number, field, detail| {
            panic!("{number} {field} {detail}")
        });
        let (mut headers, mut body) = (Vec::new(), Vec::new());
        let parts = [
            mime::Part {
                media_type: "text/plain",
                text: b"text",
            },
            mime::Part {
                media_type: "text/html",
                text: b"<p>html",
            },
        ];
        attached.write(&mut headers, &mut body, "01JD.7", &parts);
        [&headers[..], b"\r\n", &body].concat()
    }

    #[test]
    fn files_stand_beside_the_text_and_pictures_with_the_html() {
        let all = [
            file("a.pdf", b"file", None),
            file("logo \"é\".png", b"picture", Some("logo@x")),
        ];
        let message = message(&all);
        let parsed = MessageParser::new().parse(&message).expect("a message");
        let kinds: Vec<String> = parsed
            .parts
            .iter()
            .map(|part| {
                let kind = part.content_type().expect("a type");
                format!("{}/{}", kind.ctype(), kind.subtype().unwrap_or_default())
            })
            .collect();
        let expected = [
            "multipart/mixed",
            "multipart/related",
            "multipart/alternative",
            "text/plain",
            "text/html",
            "image/png",
            "image/png",
        ];
        assert_eq!(kinds, expected);
        assert_eq!(parsed.parts[5].attachment_name(), Some("logo \"é\".png"));
        assert_eq!(parsed.parts[5].content_id(), Some("logo@x"));
        assert_eq!(parsed.parts[5].contents(), b"picture");
        assert_eq!(parsed.parts[6].contents(), b"file");
        let text = String::from_utf8(message).expect("ASCII");
        assert_eq!(text.matches("MIME-Version").count(), 1);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut wrong = Vec::new();
        let mut bad = file("", b"", Some("<x>"));
        bad.media_type = "png".to_owned();
        bad.content = "?".to_owned();
        Attached::read(&[bad], |number, field, _| {
            wrong.push((number, field.to_owned()))
        });
        let names = ["filename", "type", "content_id", "content"];
        assert_eq!(wrong, names.map(|name| (0, name.to_owned())));
    }

    proptest! {
        #[test]
        fn any_file_survives(name in "\\PC{1,40}", content: Vec<u8>) {
            prop_assume!(!name.chars().any(char::is_control) && name.trim() == name);
            let message = message(&[file(&name, &content, None)]);
            let parsed = MessageParser::new().parse(&message).expect("a message");
            let last = parsed.parts.last().expect("a part");
            prop_assert_eq!(last.contents(), &content[..]);
            prop_assert_eq!(last.attachment_name(), Some(name.as_str()));
            prop_assert!(message.split(|byte| *byte == b'\n').all(|line| line.len() < 999));
        }
    }
}
