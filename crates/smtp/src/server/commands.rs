//! One command line: its syntax is smtp-proto's, whether it may come now is decided here.

use std::borrow::Cow;

use smtp_proto::{
    Error as SyntaxError, MAIL_BODY_8BITMIME, MAIL_BODY_BINARYMIME, MAIL_SMTPUTF8, Request,
};

use super::content::DataReader;
use super::{Mode, ServerEvent, ServerSession};

impl ServerSession {
    /// Acts on one line, with its LF.
    pub(super) fn command(&mut self, line: &[u8]) {
        let Some(text) = line.strip_suffix(b"\r\n") else {
            return self.refuse(500, "5.5.2 lines end in CR LF");
        };
        if text.iter().any(|&b| b < b' ' && b != b'\t') {
            return self.refuse(500, "5.5.2 control character in command");
        }
        let request = match Request::parse(&mut line.iter()) {
            Ok(request) => request,
            Err(error) => return self.syntax_error(error),
        };
        self.note_sent_ahead(&request);
        match request {
            Request::Ehlo { host } if self.config.ehlo => self.hello(&host, true),
            Request::Helo { host } => self.hello(&host, false),
            Request::Mail { .. } | Request::Rcpt { .. } | Request::Data | Request::Bdat { .. }
                if self.client_name.is_empty() =>
            {
                // What follows a BDAT is content whatever we say to it.
                match request {
                    Request::Bdat {
                        chunk_size,
                        is_last,
                    } => self.chunk(chunk_size as u64, is_last),
                    _ => self.refuse(503, "5.5.1 say EHLO first"),
                }
            }
            Request::Mail { from } => self.mail(&from.address, from.flags, from.size as u64),
            Request::Rcpt { to } => self.rcpt(&to.address, text),
            Request::Data => self.data(),
            Request::Bdat {
                chunk_size,
                is_last,
            } => self.chunk(chunk_size as u64, is_last),
            Request::StartTls => self.starttls(),
            Request::Rset => {
                self.reset();
                self.reply(250, "2.0.0 reset");
            }
            Request::Noop { .. } => self.reply(250, "2.0.0 ok"),
            Request::Vrfy { .. } => self.reply(252, "2.5.2 send mail and see"),
            Request::Help { .. } => self.reply(214, "2.0.0 RFC 5321"),
            Request::Quit => self.ask(ServerEvent::Quit),
            Request::Auth {
                mechanism,
                initial_response,
            } if self.config.login.is_some() => self.auth(mechanism, &initial_response),
            Request::Ehlo { .. }
            | Request::Lhlo { .. }
            | Request::Auth { .. }
            | Request::Expn { .. }
            | Request::Etrn { .. }
            | Request::Atrn { .. }
            | Request::Burl { .. } => self.refuse(502, "5.5.1 command not implemented"),
        }
    }

    fn note_sent_ahead(&mut self, request: &Request<Cow<'_, str>>) {
        let ends_group = match request {
            Request::Bdat { .. } => return,
            Request::Mail { .. } | Request::Rcpt { .. } | Request::Rset => false,
            _ => true,
        };
        if !self.input.is_empty() && (ends_group || !self.config.pipelining) {
            self.ahead += 1;
        }
    }

    fn syntax_error(&mut self, error: SyntaxError) {
        match error {
            SyntaxError::InvalidSenderAddress => self.refuse(501, "5.1.7 bad reverse-path"),
            SyntaxError::InvalidRecipientAddress => self.refuse(501, "5.1.3 bad recipient"),
            SyntaxError::SyntaxError { syntax } => {
                self.refuse(501, &format!("5.5.2 syntax: {syntax}"))
            }
            SyntaxError::InvalidParameter { .. } => self.refuse(501, "5.5.4 bad parameter"),
            SyntaxError::UnsupportedParameter { .. } => {
                self.refuse(555, "5.5.4 parameter not supported")
            }
            SyntaxError::UnknownCommand
            | SyntaxError::NeedsMoreData { .. }
            | SyntaxError::ResponseTooLong
            | SyntaxError::InvalidResponse { .. } => {
                self.refuse(500, "5.5.2 command not recognised")
            }
        }
    }

    fn hello(&mut self, host: &str, extended: bool) {
        self.reset();
        self.extended = extended;
        self.client_name.clear();
        self.client_name.push_str(host);
        self.ask(ServerEvent::Hello);
    }

    fn mail(&mut self, address: &str, flags: u64, size: u64) {
        let unsupported = (flags & MAIL_BODY_8BITMIME != 0 && !self.config.eight_bit_mime)
            || (flags & MAIL_SMTPUTF8 != 0 && !self.config.smtp_utf8)
            || flags & MAIL_BODY_BINARYMIME != 0;
        if self.config.login.is_some() && self.user.is_none() {
            self.refuse(530, "5.7.0 authentication required");
        } else if self.config.mails_max.is_some_and(|max| self.mails >= max) {
            self.reply(421, "4.7.0 too many transactions on one connection");
            self.close();
        } else if self.mail {
            self.refuse(503, "5.5.1 nested MAIL");
        } else if unsupported {
            self.refuse(555, "5.5.4 parameter not supported");
        } else if size > self.config.message_max as u64 {
            self.reply(552, "5.3.4 message too large");
        } else if !address.is_ascii() && flags & MAIL_SMTPUTF8 == 0 {
            self.refuse(553, "5.6.7 address needs SMTPUTF8");
        } else {
            self.reset();
            self.mail_size = size;
            self.mails += 1;
            self.reverse_path.push_str(address);
            self.ask(ServerEvent::Mail);
        }
    }

    fn rcpt(&mut self, address: &str, text: &[u8]) {
        if !self.mail {
            return self.refuse(503, "5.5.1 MAIL first");
        }
        if self.chunked {
            return self.refuse(503, "5.5.1 content has begun");
        }
        if self.accepted >= self.config.recipients_max {
            return self.reply(452, "4.5.3 too many recipients");
        }
        // The parser knows `<postmaster>` without domain (RFC 5321 §4.5.1) and
        // returns it empty, like the null path, which is no recipient.
        let address = match address {
            "" if text.windows(2).any(|pair| pair == b"<>") => {
                return self.refuse(501, "5.1.3 bad recipient");
            }
            "" => "postmaster",
            address => address,
        };
        if self.recipients.len() == self.accepted {
            self.recipients.push(String::new());
        }
        if let Some(slot) = self.recipients.get_mut(self.accepted) {
            slot.clear();
            slot.push_str(address);
        }
        self.ask(ServerEvent::Rcpt);
    }

    fn data(&mut self) {
        if !self.mail || self.chunked {
            self.refuse(503, "5.5.1 MAIL and RCPT first");
        } else if self.accepted > 0 {
            self.ask(ServerEvent::Data);
        } else if self.config.data_without_recipients {
            self.mode = Mode::Data(DataReader::default());
            self.reply(354, "go ahead, for nobody");
        } else {
            self.refuse(554, "5.5.1 no valid recipients");
        }
    }

    fn chunk(&mut self, size: u64, last: bool) {
        let keep = self.config.chunking && self.mail && self.accepted > 0;
        self.chunked |= keep;
        self.mode = Mode::Bdat {
            left: size,
            last,
            keep,
        };
    }

    fn starttls(&mut self) {
        if self.tls || !self.config.starttls {
            return self.refuse(502, "5.5.1 STARTTLS not available");
        }
        if !self.input.is_empty() {
            // Whoever injected it must not be heard inside the TLS session.
            self.reply(421, "4.7.0 plaintext after STARTTLS");
            return self.close();
        }
        self.ask(ServerEvent::StartTls);
    }
}
