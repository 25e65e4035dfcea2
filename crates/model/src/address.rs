//! Mail addresses, parsed once.
//!
//! The grammar is RFC 5321 section 4.1.2 (`Mailbox`) with RFC 6531's UTF-8.
//!
//! DEVIATES: quoted local parts, address literals and single-label domains are refused. No provider
//! that we know delivers to them, and in a list they are mistakes.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

/// Why a text is not an address that we send to. `Display` is fit for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Nothing there.
    #[error("is empty")]
    Empty,
    /// No `@`.
    #[error("has no @")]
    NoAt,
    /// White space, a control character, or one of `<>()[]\,;:"`.
    #[error("has a character that an address cannot have")]
    Character,
    /// Nothing before the `@`, a dot at an end, or two in a row.
    #[error("has a local part with an empty piece between dots")]
    LocalPart,
    /// Over 64 octets before the `@`, or 254 in all (RFC 5321 section 4.5.3.1).
    #[error("is too long: 64 octets before the @ and 254 in all are the limits")]
    TooLong,
    /// Not a fully qualified name of letters, digits and hyphens, also after IDNA.
    #[error("has a domain that is not a fully qualified host name")]
    Domain,
}

/// A domain name in its ASCII form (A-labels), lower case, without a final dot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain(Box<str>);

impl Domain {
    /// The name, lower case ASCII.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Domain {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if is_plain_domain(text) {
            return Ok(Self(text.into()));
        }
        let is_ascii_form = !text.is_empty()
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
            && !text.contains("xn--");
        let ascii: Box<str> = if is_ascii_form {
            text.into()
        } else {
            idna::domain_to_ascii_strict(text)
                .map_err(|_| AddressError::Domain)?
                .into()
        };
        let labels_fit = ascii.split('.').all(|label| {
            (1..=63).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-')
        });
        let numeric_end = ascii
            .rsplit('.')
            .next()
            .is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
        if !labels_fit || numeric_end || !ascii.contains('.') || ascii.len() > 253 {
            return Err(AddressError::Domain);
        }
        Ok(Self(ascii))
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An address that may stand in `RCPT TO:<…>` as it is: no control character, no space, no angle
/// bracket. The local part is as given; the domain is in lower case ASCII form.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EmailAddress {
    text: Box<str>,
    /// Where the `@` is.
    at: u8,
}

impl EmailAddress {
    /// The whole address.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// What stands before the `@`, as given.
    pub fn local_part(&self) -> &str {
        self.text.get(..usize::from(self.at)).unwrap_or_default()
    }

    /// The domain: lower case, ASCII.
    pub fn domain(&self) -> &str {
        self.text
            .get(usize::from(self.at) + 1..)
            .unwrap_or_default()
    }

    /// The form in which addresses are compared: without case.
    pub fn normalised(&self) -> Cow<'_, str> {
        let changes = |byte: u8| byte.is_ascii_uppercase() || !byte.is_ascii();
        // Not `any`: looking at every byte is faster than stopping at the first.
        match self.text.bytes().fold(false, |so, byte| so | changes(byte)) {
            true => self.text.to_lowercase().into(),
            false => Cow::Borrowed(&self.text),
        }
    }

    /// Whether the peer must offer SMTPUTF8 (RFC 6531).
    pub fn needs_smtputf8(&self) -> bool {
        !self.text.is_ascii()
    }

    /// An address as nearly all are, which is kept as it is. None: it takes a closer look.
    fn plain(text: &str) -> Option<Self> {
        let (local, domain) = text.rsplit_once('@')?;
        let is_plain = text.len() <= 254
            && local.len() <= 64
            && is_plain_local(local.as_bytes())
            && is_plain_domain(domain);
        is_plain.then_some(())?;
        Some(Self {
            text: text.into(),
            at: u8::try_from(local.len()).ok()?,
        })
    }

    /// By the whole grammar.
    fn read(text: &str) -> Result<Self, AddressError> {
        let text = text.trim_matches([' ', '\t']);
        if text.is_empty() {
            return Err(AddressError::Empty);
        }
        let (local, domain) = text.rsplit_once('@').ok_or(AddressError::NoAt)?;
        if local.len() > 64 || text.len() > 254 {
            return Err(AddressError::TooLong);
        }
        if local.chars().any(forbidden) {
            return Err(AddressError::Character);
        }
        if local.split('.').any(str::is_empty) {
            return Err(AddressError::LocalPart);
        }
        let domain: Domain = domain.parse()?;
        let text = format!("{local}@{}", domain.as_str());
        if text.len() > 254 {
            return Err(AddressError::TooLong);
        }
        let at = u8::try_from(local.len()).map_err(|_| AddressError::TooLong)?;
        Ok(Self {
            text: text.into(),
            at,
        })
    }
}

/// Whether this is a host name in its final form, fully qualified and without A-labels: letters in
/// lower case, digits and single hyphens. (Two hyphens may be those of an A-label.)
fn is_plain_domain(text: &str) -> bool {
    let (mut before, mut label, mut has_dot, mut is_number) = (b'.', 0_usize, false, true);
    for byte in text.bytes() {
        let fits = match byte {
            b'a'..=b'z' => {
                is_number = false;
                true
            }
            b'0'..=b'9' => true,
            b'-' => {
                is_number = false;
                before != b'.' && before != b'-'
            }
            b'.' => before != b'.' && before != b'-',
            _ => false,
        };
        if !fits || label > 63 {
            return false;
        }
        label += 1;
        if byte == b'.' {
            (label, has_dot, is_number) = (0, true, true);
        }
        before = byte;
    }
    has_dot && !is_number && before != b'.' && before != b'-' && label <= 63 && text.len() <= 253
}

/// Whether this is a local part in ASCII of whatever may stand there; not what is at fault.
fn is_plain_local(text: &[u8]) -> bool {
    let mut before = b'.';
    for &byte in text {
        let fits = match byte {
            b'.' => before != b'.',
            b'<' | b'>' | b'(' | b')' | b'[' | b']' | b'\\' | b',' | b';' | b':' | b'"' | b'@' => {
                false
            }
            _ => byte.is_ascii_graphic(),
        };
        if !fits {
            return false;
        }
        before = byte;
    }
    before != b'.'
}

fn forbidden(c: char) -> bool {
    c.is_control()
        || c.is_whitespace()
        || matches!(c, '<' | '>' | '(' | ')' | '[' | ']' | '\\' | ',' | ';' | ':' | '"' | '@' | '\u{feff}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
}

impl FromStr for EmailAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        Self::plain(text).map_or_else(|| Self::read(text), Ok)
    }
}

impl fmt::Display for EmailAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl fmt::Debug for EmailAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! serde_as_text {
    ($name:ty) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(from)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
serde_as_text!(Domain);
serde_as_text!(EmailAddress);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_that_we_send_to() {
        for (text, whole) in [
            ("a@x.example", "a@x.example"),
            (" A.b+c@X.Example ", "A.b+c@x.example"),
            (
                "o'hara!#$%&*/=?^_`{|}~-@x.example",
                "o'hara!#$%&*/=?^_`{|}~-@x.example",
            ),
            ("a@bücher.example", "a@xn--bcher-kva.example"),
            ("山田@例え.jp", "山田@xn--r8jz45g.jp"),
        ] {
            let address: EmailAddress = text.parse().unwrap();
            assert_eq!(address.as_str(), whole);
            assert_eq!(
                format!("{}@{}", address.local_part(), address.domain()),
                whole
            );
        }
        assert_eq!(
            "A@X.example".parse::<EmailAddress>().unwrap().normalised(),
            "a@x.example"
        );
    }

    #[test]
    fn addresses_that_we_refuse() {
        use AddressError::*;
        let long = format!("{}@x.example", "a".repeat(65));
        for (text, why) in [
            ("", Empty),
            ("no-at-sign", NoAt),
            ("a b@x.example", Character),
            ("a\r\nDATA@x.example", Character),
            ("\"a b\"@x.example", Character),
            ("a@b@x.example", Character),
            ("<a@x.example>", Character),
            ("@x.example", LocalPart),
            (".a@x.example", LocalPart),
            ("a..b@x.example", LocalPart),
            ("a@", Domain),
            ("a@localhost", Domain),
            ("a@x..example", Domain),
            ("a@-x.example", Domain),
            ("a@x_y.example", Domain),
            ("a@x.example\r\n", Domain),
            ("a@127.0.0.1", Domain),
            ("a@[127.0.0.1]", Domain),
            (&long, TooLong),
        ] {
            assert_eq!(text.parse::<EmailAddress>(), Err(why), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_plain_is_read_as_the_grammar_reads_it(
            text in "[aZ0.!'<é -]{0,6}[@]{0,2}[ab0-9X.-]{0,9}(\\.|-|xn--|[.]example|[.]7|é)?",
            long in 0_usize..70,
        ) {
            let long = format!("{}{text}{}", "a".repeat(long), "b".repeat(long));
            for text in [&text, &long] {
                let (plain, read) = (EmailAddress::plain(text), EmailAddress::read(text));
                prop_assert!(plain.is_none() || plain == read.ok(), "{text:?}");
                let of = EmailAddress::read(text);
                prop_assert!(of.is_err() || of.as_ref().is_ok_and(|of| of.normalised() == of.as_str().to_lowercase()));
            }
        }

        #[test]
        fn a_plain_domain_is_its_own_ascii_form(text in "[a-c0-9.-]{0,8}(\\.example)?") {
            if is_plain_domain(&text) {
                prop_assert_eq!(idna::domain_to_ascii_strict(&text).ok(), Some(text.clone()));
                prop_assert!(text.split('.').all(|label| !label.is_empty() && label.len() <= 63));
                prop_assert!(text.contains('.') && !text.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit())));
            }
        }

        #[test]
        fn what_is_accepted_is_safe_on_the_wire(text in "\\PC{0,20}@[a-z.-]{0,20}") {
            if let Ok(address) = text.parse::<EmailAddress>() {
                prop_assert!(!address.as_str().chars().any(|c| c.is_control() || c == ' ' || c == '<' || c == '>'));
                prop_assert_eq!(address.as_str().parse::<EmailAddress>(), Ok(address.clone()));
            }
        }
    }
}
