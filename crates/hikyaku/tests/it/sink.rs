//! A receiving server that remembers who got how many copies, and whether they were the same.

use anyhow::Result;
use testkit::smtp_peer::{Keep, Received, SmtpPeer, Temper};

pub(crate) struct Sink(SmtpPeer);

impl Sink {
    pub(crate) async fn start() -> Result<Self> {
        Self::tempered(Temper::accepting()).await
    }

    /// With a temper of its own, and the same memory.
    pub(crate) async fn tempered(temper: Temper) -> Result<Self> {
        let temper = temper.keeping(Keep::PerRecipient(1_000_000));
        Ok(Self(SmtpPeer::start(temper).await?))
    }

    /// Keeps the messages themselves.
    pub(crate) async fn keeping_messages() -> Result<Self> {
        Self::keeping_messages_of(Temper::accepting()).await
    }

    /// With a temper of its own, and keeps the messages themselves.
    pub(crate) async fn keeping_messages_of(temper: Temper) -> Result<Self> {
        Ok(Self(SmtpPeer::start(temper).await?))
    }

    /// From now on it is in another temper.
    pub(crate) fn set_temper(&self, temper: Temper) {
        self.0.set_temper(temper);
    }

    /// The messages kept, in order.
    pub(crate) fn messages(&self) -> Vec<Received> {
        self.0.messages()
    }

    /// The tracked links in the messages kept, in order.
    pub(crate) fn links(&self, tracker: &str) -> Vec<String> {
        let start = format!("href=\"{tracker}/c/");
        let texts = self.0.messages().into_iter().map(|message| {
            let parsed = mail_parser::MessageParser::default()
                .parse(&message.content)
                .expect("a message");
            parsed.body_html(0).expect("an HTML part").into_owned()
        });
        texts
            .flat_map(|html| {
                let links = html
                    .split(&start)
                    .skip(1)
                    .filter_map(|rest| rest.split_once('"'));
                links
                    .map(|(token, _)| format!("{tracker}/c/{token}"))
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    pub(crate) fn address(&self) -> String {
        self.0.address().to_string()
    }

    /// Messages taken, second copies included.
    pub(crate) fn copies(&self) -> u64 {
        self.0.counts().messages
    }

    pub(crate) fn open_connections(&self) -> u64 {
        self.0.counts().open
    }

    /// Recipients that got at least one copy.
    pub(crate) fn distinct(&self) -> usize {
        self.0.copies().len()
    }

    /// Nobody is missing, and nobody got a second copy.
    pub(crate) fn assert_one_copy_each(&self, recipients: usize) {
        let several = self.several();
        assert!(several.is_empty(), "second copies: {several:?}");
        assert_eq!(self.distinct(), recipients, "people who got a copy");
    }

    /// Who got how many copies, of those who got more than one.
    pub(crate) fn several(&self) -> Vec<(String, u64)> {
        let copies = self.0.copies().into_iter();
        let several = copies.map(|(recipient, of)| (recipient, of.count));
        several.filter(|(_, count)| *count > 1).collect()
    }

    /// Every copy that a recipient got has the same bytes, and so the same Message-ID.
    pub(crate) fn assert_copies_are_the_same(&self) {
        let changed: Vec<_> = self
            .0
            .copies()
            .into_iter()
            .filter(|(_, copies)| !copies.same)
            .collect();
        assert!(changed.is_empty(), "copies that differ: {changed:?}");
    }
}
