//! What a server offers: the reply to EHLO (RFC 5321 §4.1.1.1).
//!
//! Only keywords that change what we send are kept; the rest is ignored.

use crate::reply::Reply;

/// The extensions of one server, as it announced them on this connection.
///
/// The default is what a server that only knows HELO offers: nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// The name with which the server introduced itself.
    pub host: String,
    /// RFC 2920: commands may be sent without waiting.
    pub pipelining: bool,
    /// RFC 1870: SIZE may be declared.
    pub size: bool,
    /// RFC 1870: the largest message in bytes, when the server named one.
    pub size_max: Option<u64>,
    /// RFC 6152: bodies with the high bit set.
    pub eight_bit_mime: bool,
    /// RFC 6531: addresses and headers in UTF-8.
    pub smtp_utf8: bool,
    /// RFC 3030: BDAT.
    pub chunking: bool,
    /// RFC 3207: this connection can be upgraded to TLS.
    pub starttls: bool,
    /// RFC 2034: replies carry enhanced status codes.
    pub enhanced_status_codes: bool,
    /// RFC 4954: SASL mechanisms, in upper case.
    pub auth: Vec<String>,
    /// RFC 9422: recipients per transaction.
    pub rcpt_max: Option<u32>,
    /// RFC 9422: transactions per connection.
    pub mail_max: Option<u32>,
}

/// Mechanisms kept of an AUTH line; more are of no use to us.
const AUTH_MAX: usize = 32;

impl Capabilities {
    /// Reads the reply to EHLO. Unknown keywords and malformed values are
    /// ignored: a server that garbles an extension does not offer it.
    #[must_use]
    pub fn parse(reply: &Reply) -> Self {
        let mut lines = reply.lines();
        let host = lines
            .next()
            .and_then(|line| line.split_ascii_whitespace().next())
            .unwrap_or_default();
        let mut capabilities = Self {
            host: host.to_owned(),
            ..Self::default()
        };
        for line in lines {
            capabilities.take_line(line);
        }
        capabilities
    }

    fn take_line(&mut self, line: &str) {
        let mut words = line.split_ascii_whitespace();
        let Some(keyword) = words.next() else { return };
        match keyword.to_ascii_uppercase().as_str() {
            "PIPELINING" => self.pipelining = true,
            "SIZE" => {
                self.size = true;
                // Zero means that no fixed maximum is in force (RFC 1870 §4).
                self.size_max = words.next().and_then(|n| n.parse().ok()).filter(|&n| n > 0);
            }
            "8BITMIME" => self.eight_bit_mime = true,
            "SMTPUTF8" => self.smtp_utf8 = true,
            "CHUNKING" => self.chunking = true,
            "STARTTLS" => self.starttls = true,
            "ENHANCEDSTATUSCODES" => self.enhanced_status_codes = true,
            "LIMITS" => words.for_each(|limit| self.take_limit(limit)),
            "AUTH" => self.take_mechanisms(words),
            // Old servers wrote `AUTH=LOGIN PLAIN`.
            other => {
                if let Some(first) = other.strip_prefix("AUTH=") {
                    self.take_mechanisms(std::iter::once(first).chain(words));
                }
            }
        }
    }

    fn take_limit(&mut self, limit: &str) {
        let Some((name, value)) = limit.split_once('=') else {
            return;
        };
        let value = value.parse().ok().filter(|&n| n > 0);
        match name.to_ascii_uppercase().as_str() {
            "RCPTMAX" => self.rcpt_max = value,
            "MAILMAX" => self.mail_max = value,
            _ => {}
        }
    }

    fn take_mechanisms<'a>(&mut self, words: impl Iterator<Item = &'a str>) {
        for word in words.take(AUTH_MAX) {
            let mechanism = word.to_ascii_uppercase();
            if self.auth.len() < AUTH_MAX && !self.auth.contains(&mechanism) {
                self.auth.push(mechanism);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_offer() {
        let reply = Reply::new(
            250,
            "mx.example at your service\nPIPELINING\nSIZE 52428800\n8bitmime\nSMTPUTF8\nCHUNKING\nSTARTTLS\n\
             ENHANCEDSTATUSCODES\nAUTH PLAIN login\nAUTH=LOGIN XOAUTH2\nLIMITS RCPTMAX=100 MAILMAX=20 X=1\nX-ODD thing",
        );
        assert_eq!(
            Capabilities::parse(&reply),
            Capabilities {
                host: "mx.example".into(),
                pipelining: true,
                size: true,
                size_max: Some(52_428_800),
                eight_bit_mime: true,
                smtp_utf8: true,
                chunking: true,
                starttls: true,
                enhanced_status_codes: true,
                auth: vec!["PLAIN".into(), "LOGIN".into(), "XOAUTH2".into()],
                rcpt_max: Some(100),
                mail_max: Some(20),
            }
        );
    }

    #[test]
    fn odd_values_offer_nothing() {
        let reply = Reply::new(250, "mx\nSIZE 0\nLIMITS RCPTMAX=0 MAILMAX=x\nPIPELININGS");
        let want = Capabilities {
            host: "mx".into(),
            size: true,
            ..Capabilities::default()
        };
        assert_eq!(Capabilities::parse(&reply), want);
        assert_eq!(
            Capabilities::parse(&Reply::new(250, "")),
            Capabilities::default()
        );
        assert_eq!(
            Capabilities::parse(&Reply::new(250, "mx\nSIZE -1\nSIZE 99999999999999999999"))
                .size_max,
            None
        );
    }
}
