//! Reads along on one connection: commands, replies, and of the content its header only.
//!
//! Owns what is left out: credentials, local parts of recipients, values of header fields that
//! name a person or hold a link of theirs, and the content after the header. What it cannot place
//! it does not show: whoever begins to listen in the middle of a content hears nothing until that
//! has ended.

use std::io::IoSlice;
use std::sync::Arc;

use model::MessageId;

use super::{Line, Traces, Voice};
use crate::explain::mask::without_addresses;
use crate::shaping::Destination;

/// Bytes of a line that are kept; the rest is left out.
const LINE_MAX: usize = 400;
/// Header lines shown of a message.
const HEADER_MAX: usize = 60;
/// Commands without a reply that are remembered.
const OPEN_MAX: usize = 64;
/// Fields whose values are left out.
const HIDDEN: [&str; 7] = [
    "to",
    "cc",
    "bcc",
    "subject",
    "list-unsubscribe",
    "reply-to",
    "x-recipient",
];

/// Where the bytes that we write belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nobody knows; after the end of a content it is known.
    Lost,
    Commands,
    /// DATA was written; its reply says what comes.
    AfterData,
    /// In the content, up to the line with a dot.
    Header,
    Body,
    /// In the content, for this many bytes more.
    Chunk {
        left: u64,
        in_header: bool,
        is_last: bool,
    },
    /// AUTH was written: what follows is secret until its last reply.
    Secret,
}

/// See the module. One per connection; passes from one stream of it to the next.
#[derive(Debug)]
pub struct Tap {
    traces: Arc<Traces>,
    connection: u64,
    destination: Destination,
    source: Arc<str>,
    host: Arc<str>,
    /// It has heard everything up to now.
    follows: bool,
    place: Place,
    /// The line that is being written or read.
    ours: Partial,
    theirs: Partial,
    /// The message of the transaction that is being written.
    message: Option<MessageId>,
    /// Of the commands without a reply, oldest first.
    open: std::collections::VecDeque<Option<MessageId>>,
    /// It is known which reply is whose.
    is_aligned: bool,
    last_code: u16,
    content_bytes: u64,
    header_lines: usize,
    /// The value of the present header field is left out.
    hides: bool,
}

/// A line that has not ended yet.
#[derive(Debug, Default)]
struct Partial {
    bytes: Vec<u8>,
    /// All of it, kept or not.
    length: usize,
    /// The last byte was a CR.
    after_cr: bool,
}

impl Partial {
    /// Takes a byte; true when it ended the line, which [`Self::take`] then gives.
    fn push(&mut self, byte: u8) -> bool {
        match byte {
            b'\n' => return true,
            b'\r' => self.after_cr = true,
            _ => {
                self.after_cr = false;
                self.length += 1;
                if self.bytes.len() < LINE_MAX {
                    self.bytes.push(byte);
                }
            }
        }
        false
    }

    fn take(&mut self) -> String {
        let line = String::from_utf8_lossy(&self.bytes);
        let clean = |c: char| if c.is_control() { ' ' } else { c };
        let mut text: String = line.chars().map(clean).collect();
        if self.length > LINE_MAX {
            text.push('…');
        }
        *self = Self::default();
        text
    }
}

impl Tap {
    /// For a connection to `host` that is about to be made.
    pub fn new(
        traces: &Arc<Traces>,
        connection: u64,
        destination: &Destination,
        source: &str,
        host: &str,
    ) -> Self {
        Self {
            follows: traces.are_heard(),
            traces: Arc::clone(traces),
            connection,
            destination: destination.clone(),
            source: source.into(),
            host: host.into(),
            place: Place::Commands,
            ours: Partial::default(),
            theirs: Partial::default(),
            message: None,
            open: std::collections::VecDeque::new(),
            is_aligned: true,
            last_code: 0,
            content_bytes: 0,
            header_lines: 0,
            hides: false,
        }
    }

    /// It is being made.
    pub fn dials(&mut self) {
        self.note("connecting");
    }

    /// Something happened that is not on the wire.
    pub fn note(&self, text: &str) {
        if self.traces.are_heard() {
            let mut line = Partial::default();
            for byte in text.bytes() {
                line.push(byte);
            }
            self.say(Voice::Note, line.take(), self.message);
        }
    }

    /// These bytes, at most `count` of them, were written.
    pub fn wrote(&mut self, slices: &[IoSlice<'_>], count: usize) {
        if !self.hears() {
            return;
        }
        let bytes = slices.iter().flat_map(|slice| slice.iter().copied());
        for byte in bytes.take(count) {
            self.writes(byte);
        }
    }

    /// These bytes were read.
    pub fn read(&mut self, bytes: &[u8]) {
        if !self.hears() {
            return;
        }
        for &byte in bytes {
            if self.theirs.push(byte) {
                let line = self.theirs.take();
                self.reply(line);
            }
        }
    }

    fn hears(&mut self) -> bool {
        let heard = self.traces.are_heard();
        if !heard {
            self.lose();
        } else if !self.follows {
            (self.follows, self.place, self.is_aligned) = (true, Place::Lost, false);
            self.note("joined in the middle; what is said comes after the end of this message");
        }
        heard
    }

    /// Nobody listens: what is written now is not known later.
    fn lose(&mut self) {
        if self.follows {
            self.follows = false;
            (self.ours, self.theirs) = (Partial::default(), Partial::default());
            self.open.clear();
            self.message = None;
        }
    }

    // ---- ours ---------------------------------------------------------------------------

    fn writes(&mut self, byte: u8) {
        if self.place == Place::AfterData {
            let takes = self.last_code == 354;
            self.begin(if takes {
                Place::Header
            } else {
                Place::Commands
            });
        }
        if let Place::Chunk {
            left,
            in_header,
            is_last,
        } = self.place
        {
            return self.chunk(byte, left, in_header, is_last);
        }
        if matches!(self.place, Place::Header | Place::Body) {
            self.content_bytes += 1;
        }
        if !self.ours.push(byte) {
            return;
        }
        let line = self.ours.take();
        match self.place {
            Place::Lost if line == "." => {
                // Everything before the content was answered, so its reply is the next.
                self.begin(Place::Commands);
                self.is_aligned = true;
                self.opened(None);
            }
            // With CHUNKING no dot ends a content; no content has such a line.
            Place::Lost if line.starts_with("MAIL ") && message_of(&line).is_some() => {
                self.begin(Place::Commands);
                self.command(&line);
            }
            Place::Lost | Place::AfterData | Place::Chunk { .. } => {}
            Place::Commands => self.command(&line),
            Place::Secret => self.say(Voice::Us, "[hidden]".to_owned(), self.message),
            Place::Header | Place::Body if line == "." => self.content_ends(),
            Place::Header if line.is_empty() => self.place = Place::Body,
            Place::Header => self.header(&line),
            Place::Body => {}
        }
    }

    fn begin(&mut self, place: Place) {
        self.place = place;
        (self.content_bytes, self.header_lines, self.hides) = (0, 0, false);
        self.ours = Partial::default();
    }

    fn chunk(&mut self, byte: u8, left: u64, in_header: bool, is_last: bool) {
        let mut in_header = in_header;
        if in_header && self.ours.push(byte) {
            let line = self.ours.take();
            match line.is_empty() {
                true => in_header = false,
                false => self.header(&line),
            }
        }
        self.place = Place::Chunk {
            left: left - 1,
            in_header,
            is_last,
        };
        if left == 1 {
            let text = format!("[{} bytes of content]", self.content_bytes);
            self.say(Voice::Us, text, self.message);
            self.begin(Place::Commands);
            if is_last {
                self.message = None;
            }
        }
    }

    fn content_ends(&mut self) {
        // The dot and its line ends are none of the content.
        let bytes = self.content_bytes.saturating_sub(3);
        let message = self.message.take();
        self.say(Voice::Us, format!("[{bytes} bytes of content]"), message);
        self.say(Voice::Us, ".".to_owned(), message);
        self.opened(message);
        self.begin(Place::Commands);
    }

    fn header(&mut self, line: &str) {
        let is_folded = line.starts_with([' ', '\t']);
        let name = line.split(':').next().unwrap_or_default();
        if !is_folded {
            self.hides = HIDDEN
                .iter()
                .any(|hidden| name.eq_ignore_ascii_case(hidden));
        }
        self.header_lines += 1;
        match self.header_lines {
            n if n > HEADER_MAX + 1 => {}
            n if n > HEADER_MAX => {
                self.say(Voice::Us, "[more of the header]".to_owned(), self.message)
            }
            _ if self.hides && is_folded => {}
            _ if self.hides => self.say(Voice::Us, format!("{name}: [hidden]"), self.message),
            _ => self.say(Voice::Us, line.to_owned(), self.message),
        }
    }

    fn command(&mut self, line: &str) {
        let mut words = line.split(' ');
        let verb = words.next().unwrap_or_default().to_ascii_uppercase();
        let rest = line.get(verb.len()..).unwrap_or_default();
        match verb.as_str() {
            "MAIL" => {
                self.message = message_of(rest);
                // Our own names its message and nobody else.
                let text = match self.message {
                    Some(_) => line.to_owned(),
                    None => without_addresses(line),
                };
                self.spoken(text);
            }
            "RCPT" => self.spoken(format!("{verb}{}", without_addresses(rest))),
            "DATA" => {
                self.spoken(line.to_owned());
                self.place = Place::AfterData;
                self.last_code = 0;
            }
            "BDAT" => {
                let size = words.next().and_then(|size| size.parse().ok()).unwrap_or(0);
                let is_last = words
                    .next()
                    .is_some_and(|word| word.eq_ignore_ascii_case("LAST"));
                self.spoken(line.to_owned());
                if size > 0 {
                    self.begin(Place::Chunk {
                        left: size,
                        in_header: true,
                        is_last,
                    });
                    self.content_bytes = size;
                }
            }
            "AUTH" => {
                let mechanism = words.next().unwrap_or_default();
                self.spoken(format!("AUTH {mechanism} [hidden]"));
                self.place = Place::Secret;
            }
            "EHLO" | "HELO" | "LHLO" | "STARTTLS" | "RSET" | "NOOP" | "QUIT" => {
                if verb == "RSET" {
                    self.message = None;
                }
                self.spoken(line.to_owned());
            }
            // Not a command of ours: then this is not where we thought.
            _ => self.place = Place::Lost,
        }
    }

    fn spoken(&mut self, text: String) {
        self.say(Voice::Us, text, self.message);
        self.opened(self.message);
    }

    fn opened(&mut self, message: Option<MessageId>) {
        if self.open.len() < OPEN_MAX {
            self.open.push_back(message);
        }
    }

    // ---- theirs -------------------------------------------------------------------------

    fn reply(&mut self, line: String) {
        let code: u16 = line
            .get(..3)
            .and_then(|code| code.parse().ok())
            .unwrap_or(0);
        let is_last = line.as_bytes().get(3) != Some(&b'-');
        let is_greeting = self.open.is_empty();
        let message = if is_greeting || !self.is_aligned {
            None
        } else if is_last {
            self.open.pop_front().flatten()
        } else {
            self.open.front().copied().flatten()
        };
        if is_last {
            self.last_code = code;
            if self.place == Place::Secret && code != 334 {
                self.begin(Place::Commands);
            }
        }
        // With what the server asks for and shows in SCRAM a password can be guessed at leisure.
        let text = match code {
            334 => "334 [hidden]".to_owned(),
            _ => without_addresses(&line),
        };
        self.say(Voice::Peer, text, message);
    }

    fn say(&self, from: Voice, text: String, message: Option<MessageId>) {
        self.traces.tell(Line {
            at: self.traces.clock.now(),
            connection: self.connection,
            destination: self.destination.clone(),
            source: Arc::clone(&self.source),
            host: Arc::clone(&self.host),
            from,
            text,
            message,
        });
    }
}

/// Our reverse-path names its message: `bounce+ID@domain`.
fn message_of(mail: &str) -> Option<MessageId> {
    let (_, after) = mail.split_once("<bounce+")?;
    after.split_once('@')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{Heard, Listener};
    use proptest::prelude::*;
    use service::clock::SystemClock;

    const ID: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV.41";

    struct Ear {
        tap: Tap,
        listener: Option<Listener>,
        traces: Arc<Traces>,
    }

    impl Ear {
        fn new() -> Self {
            let traces = Arc::new(Traces::new(SystemClock::shared()));
            let listener = traces.listen();
            let tap = Tap::new(&traces, 7, &Destination::named("x.example"), "ip1", "mx");
            Self {
                tap,
                listener,
                traces,
            }
        }

        fn us(&mut self, text: &str) {
            self.tap.wrote(&[IoSlice::new(text.as_bytes())], text.len());
        }

        fn peer(&mut self, text: &str) {
            self.tap.read(text.as_bytes());
        }

        /// What was heard: `>` ours, `<` theirs, `*` a note; with ` #` where the message is known.
        fn heard(&mut self) -> Vec<String> {
            let mut all = Vec::new();
            let Some(listener) = &mut self.listener else {
                return all;
            };
            while let Ok(line) = listener.lines.try_recv() {
                let mark = match line.from {
                    Voice::Us => '>',
                    Voice::Peer => '<',
                    Voice::Note => '*',
                };
                let of = if line.message.is_some() { " #" } else { "" };
                all.push(format!("{mark} {}{of}", line.text));
            }
            all
        }
    }

    #[test]
    fn a_session_is_told_without_what_is_private() {
        let mut ear = Ear::new();
        ear.peer("220 mx ESMTP\r\n");
        ear.us("EHLO mta.example\r\n");
        ear.peer("250-mx\r\n250 PIPELINING\r\n");
        ear.us("AUTH PLAIN AGEAYg==\r\n");
        ear.peer("334 more\r\n");
        ear.us("c2VjcmV0\r\n");
        ear.peer("235 ok\r\n");
        ear.us(&format!(
            "MAIL FROM:<bounce+{ID}@b.example> SIZE=900\r\nRCPT TO:<a@x.example>\r\nDA"
        ));
        ear.us("TA\r\n");
        ear.peer("250 ok\r\n250 ok for <a@x.example>\r\n354 go\r\n");
        ear.us("From: b@b.example\r\nTo: A <a@x.example>\r\n (folded)\r\nSubject: Dear A\r\n\r\nSecret\r\n..\r\n.\r\nQUIT\r\n");
        ear.peer("250 2.0.0 queued\r\n221 bye\r\n");
        let heard = ear.heard();
        let expected = [
            "< 220 mx ESMTP",
            "> EHLO mta.example",
            "< 250-mx",
            "< 250 PIPELINING",
            "> AUTH PLAIN [hidden]",
            "< 334 [hidden]",
            "> [hidden]",
            "< 235 ok",
            &format!("> MAIL FROM:<bounce+{ID}@b.example> SIZE=900 #"),
            "> RCPT TO:<***@x.example> #",
            "> DATA #",
            "< 250 ok #",
            "< 250 ok for <***@x.example> #",
            "< 354 go #",
            "> From: b@b.example #",
            "> To: [hidden] #",
            "> Subject: [hidden] #",
            "> [82 bytes of content] #",
            "> . #",
            "> QUIT",
            "< 250 2.0.0 queued #",
            "< 221 bye",
        ];
        assert_eq!(heard, expected);
    }

    #[test]
    fn a_refused_data_leaves_no_content_and_chunks_are_counted() {
        let mut ear = Ear::new();
        ear.us("MAIL FROM:<>\r\nRCPT TO:<a@x.example>\r\nDATA\r\n");
        ear.peer("250 ok\r\n550 no\r\n554 none\r\n");
        ear.us("RSET\r\nMAIL FROM:<>\r\nBDAT 21 LAST\r\nSubject: x\r\n\r\nHello\r\nQUIT\r\n");
        let heard = ear.heard();
        let expected = [
            "> MAIL FROM:<>",
            "> RCPT TO:<***@x.example>",
            "> DATA",
            "< 250 ok",
            "< 550 no",
            "< 554 none",
            "> RSET",
            "> MAIL FROM:<>",
            "> BDAT 21 LAST",
            "> Subject: [hidden]",
            "> [21 bytes of content]",
            "> QUIT",
        ];
        assert_eq!(heard, expected);
    }

    #[test]
    fn who_comes_late_hears_nothing_of_the_content_that_is_on_its_way() {
        let mut ear = Ear::new();
        ear.listener = None;
        ear.us("MAIL FROM:<>\r\nDATA\r\n");
        ear.listener = ear.traces.listen();
        ear.us("MAIL FROM:<secret@x.example>\r\nsecret\r\n.\r\nMAIL FROM:<>\r\n");
        ear.peer("250 queued\r\n250 ok\r\n");
        let heard = ear.heard();
        assert!(heard[0].starts_with("* joined"), "{heard:?}");
        assert_eq!(heard[1..], ["> MAIL FROM:<>", "< 250 queued", "< 250 ok"]);
    }

    #[test]
    fn who_comes_late_to_chunks_hears_the_next_message() {
        let mut ear = Ear::new();
        ear.listener = None;
        ear.us("BDAT 100 LAST\r\nsecret");
        ear.listener = ear.traces.listen();
        ear.us(&format!(
            "secret\r\nRSET\r\nMAIL FROM:<bounce+{ID}@b.example>\r\nRCPT TO:<a@x>\r\n"
        ));
        ear.peer("250 accepted\r\n250 reset\r\n250 ok\r\n");
        let heard = ear.heard();
        let expected = [
            &format!("> MAIL FROM:<bounce+{ID}@b.example> #"),
            "> RCPT TO:<***@x> #",
            // Nobody knows how many replies were to come: they are nobody's.
            "< 250 accepted",
            "< 250 reset",
            "< 250 ok",
        ];
        assert_eq!(heard[1..], expected);
    }

    #[test]
    fn what_is_no_command_is_not_shown() {
        let mut ear = Ear::new();
        ear.us("Dear Alice,\r\nMAIL FROM:<x@y>\r\n.\r\nQUIT\r\n");
        assert_eq!(ear.heard(), ["> QUIT"]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_told_on_bounded_printable_lines(
            parts in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 0..200)), 0..20)
        ) {
            let mut ear = Ear::new();
            for (ours, bytes) in parts {
                if ours {
                    ear.tap.wrote(&[IoSlice::new(&bytes)], bytes.len());
                } else {
                    ear.tap.read(&bytes);
                }
            }
            for line in ear.heard() {
                prop_assert!(line.len() <= 4 * LINE_MAX && !line.contains(char::is_control));
            }
        }

        /// However the bytes are cut, the content is not told.
        #[test]
        fn a_secret_stays_one(cuts in proptest::collection::vec(1_usize..30, 1..30)) {
            let mut ear = Ear::new();
            ear.us("MAIL FROM:<>\r\nRCPT TO:<secret@x.example>\r\nDATA\r\n");
            ear.peer("250 a\r\n250 b\r\n354 c\r\n");
            let mut text = "Subject: secret\r\n secret\r\n\r\nsecret\r\nMAIL FROM:<secret@x>\r\n..\r\n.\r\nQUIT\r\n";
            for cut in cuts.into_iter().cycle() {
                let (now, later) = text.split_at(cut.min(text.len()));
                ear.us(now);
                text = later;
                if text.is_empty() {
                    break;
                }
            }
            let heard = ear.heard();
            prop_assert!(heard.iter().all(|line| !line.contains("secret")), "{:?}", heard);
            prop_assert_eq!(heard.last().map(String::as_str), Some("> QUIT"));
        }
    }

    #[tokio::test]
    async fn lines_reach_a_listener() {
        let mut ear = Ear::new();
        ear.us("NOOP\r\n");
        let listener = ear.listener.as_mut().expect("a listener");
        let Some(Heard::Line(line)) = listener.next().await else {
            panic!("a line");
        };
        assert_eq!(
            (line.connection, line.destination.as_str(), &*line.source),
            (7, "x.example", "ip1")
        );
    }
}
