//! What user agents say of themselves, by the lists of the rules. All texts are lower case and
//! compared so. Every hit is read here before it is answered, so all parts of all lists are looked
//! for in one pass, and a text that was read a moment ago is known by itself: browsers of one version
//! all say the same.

use aho_corasick::{AhoCorasick, AhoCorasickKind, BuildError};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a user agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Agent {
    /// Says of itself that it is a program acting alone.
    Automated,
    /// Fetches images ahead of the person, whether or not the person ever looks.
    Prefetcher,
    /// Fetches images for a person, mostly when the person looks; the person cannot be seen.
    ImageProxy,
    /// Has the shape of a browser or a mail program with a browser in it.
    Browser,
    /// Neither.
    Other,
}

/// Parts, one of which every browser and every mail program with a rendering engine shows next to
/// `Mozilla/`.
const ENGINES: &[&str] = &[
    "applewebkit/",
    "gecko/",
    "trident/",
    "msie ",
    "presto/",
    // Thunderbird and Outlook name themselves where a browser names its engine.
    "thunderbird/",
    "microsoft outlook",
];

/// What a program that acts alone often has at the end of its name.
const BOT: &str = "bot";

/// The lists of user agents, as they are in the rules.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lists {
    pub(crate) prefetchers: Texts,
    pub(crate) image_proxies: Texts,
    pub(crate) automated: Texts,
    /// Parts of what persons use, which other rules would take for machines.
    pub(crate) people: Vec<String>,
}

/// Texts that a thread remembers, a power of two …
const REMEMBERED: usize = 256;
/// … of at most so many bytes each: 64 KiB in all.
const REMEMBERED_BYTES: usize = 256;

/// A text that was read: by which lists, and what it is.
type Known = Option<(u64, Box<str>, Agent)>;

thread_local! {
    /// By [`place_of`]; empty until the first is read.
    static KNOWN: RefCell<Vec<Known>> = const { RefCell::new(Vec::new()) };
}

/// Numbers the lists that were ever made.
static MADE: AtomicU64 = AtomicU64::new(0);

/// Where a text is remembered: one place each, so that who asks with ever new texts takes places, no
/// more. A few bytes tell those apart that come often.
fn place_of(agent: &str) -> usize {
    let bytes = agent.as_bytes();
    let sample = bytes.iter().rev().step_by(3);
    let hash = sample.fold(bytes.len() as u64, |hash, byte| {
        (hash.rotate_left(5) ^ u64::from(*byte)).wrapping_mul(0x517c_c1b7_2722_0a95)
    });
    usize::try_from(hash >> 56).unwrap_or(0) % REMEMBERED
}

/// The lists of user agents, ready to be looked for.
#[derive(Debug, Clone)]
pub(crate) struct Agents {
    /// No other lists have this number.
    number: u64,
    lists: Lists,
    parts: AhoCorasick,
    /// What each of `parts` stands for, in their order.
    means: Vec<Means>,
}

#[derive(Debug, Clone, Copy)]
enum Means {
    Prefetcher,
    ImageProxy,
    Automated,
    Engine,
    /// [`BOT`]: where a word ends in it.
    Bot,
}

/// What a user agent is, or has in it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Texts {
    pub(crate) whole: Vec<String>,
    pub(crate) parts: Vec<String>,
}

impl Texts {
    fn know_whole(&self, agent: &str) -> bool {
        let mut whole = self.whole.iter();
        whole.any(|whole| whole.eq_ignore_ascii_case(agent))
    }
}

/// Which lists have a part of a user agent.
#[derive(Debug, Clone, Copy, Default)]
struct Found {
    prefetcher: bool,
    image_proxy: bool,
    automated: bool,
    engine: bool,
}

impl Agents {
    /// Prepares the lists.
    ///
    /// # Errors
    /// When they are too large together.
    pub(crate) fn new(lists: Lists) -> Result<Self, BuildError> {
        let each = |texts: &'static str| (texts, Means::Engine);
        let of = |texts: &Texts, means| {
            let parts = texts.parts.clone().into_iter();
            parts.map(move |part| (part, means)).collect::<Vec<_>>()
        };
        let engines = ENGINES.iter().copied().map(each);
        let (parts, means): (Vec<String>, Vec<Means>) = of(&lists.prefetchers, Means::Prefetcher)
            .into_iter()
            .chain(of(&lists.image_proxies, Means::ImageProxy))
            .chain(of(&lists.automated, Means::Automated))
            .chain(engines.map(|(engine, means)| (engine.to_owned(), means)))
            .chain([(BOT.to_owned(), Means::Bot)])
            .unzip();
        let parts = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            // A step a byte: the lists are short, and user agents are not.
            .kind(Some(AhoCorasickKind::DFA))
            .build(&parts)?;
        Ok(Self {
            number: MADE.fetch_add(1, Ordering::Relaxed),
            lists,
            parts,
            means,
        })
    }

    /// Reads a user agent.
    pub(crate) fn read(&self, user_agent: &str) -> Agent {
        let agent = user_agent.trim();
        if agent.len() > REMEMBERED_BYTES {
            return self.find_out(agent);
        }
        KNOWN.with_borrow_mut(|known| {
            if known.is_empty() {
                known.resize(REMEMBERED, None);
            }
            let Some(place) = known.get_mut(place_of(agent)) else {
                return self.find_out(agent);
            };
            if let Some((number, text, what)) = place
                && *number == self.number
                && **text == *agent
            {
                return *what;
            }
            let what = self.find_out(agent);
            *place = Some((self.number, agent.into(), what));
            what
        })
    }

    fn find_out(&self, agent: &str) -> Agent {
        let found = self.look(agent);
        let Lists {
            prefetchers,
            image_proxies,
            automated,
            ..
        } = &self.lists;
        let starts = |with: &str| {
            let start = agent.as_bytes().get(..with.len());
            start.is_some_and(|start| start.eq_ignore_ascii_case(with.as_bytes()))
        };
        if found.prefetcher || prefetchers.know_whole(agent) {
            Agent::Prefetcher
        } else if found.image_proxy || image_proxies.know_whole(agent) {
            Agent::ImageProxy
        } else if found.automated || automated.know_whole(agent) {
            Agent::Automated
        } else if (starts("mozilla/") || starts("opera/")) && found.engine {
            Agent::Browser
        } else {
            Agent::Other
        }
    }

    /// Looks for all parts at once.
    fn look(&self, agent: &str) -> Found {
        let mut found = Found::default();
        for part in self.parts.find_overlapping_iter(agent) {
            match self.means.get(part.pattern().as_usize()) {
                Some(Means::Prefetcher) => found.prefetcher = true,
                Some(Means::ImageProxy) => found.image_proxy = true,
                Some(Means::Automated) => found.automated = true,
                Some(Means::Engine) => found.engine = true,
                Some(Means::Bot) => found.automated |= self.names_a_bot(agent, part.end()),
                None => {}
            }
        }
        found
    }

    /// Whether the `bot` that ends at `end` ends a word, perhaps with an `s`: `Googlebot/2.1`,
    /// `bot.html`, but not `robotics`, nor a word that stands for people.
    fn names_a_bot(&self, agent: &str, end: usize) -> bool {
        let of_word = |byte: &u8| byte.is_ascii_alphanumeric();
        let (before, after) = agent.as_bytes().split_at(end);
        let word_end = match after {
            [b's' | b'S', ..] => end + 1,
            _ => end,
        };
        let begin = before.iter().rposition(|byte| !of_word(byte));
        let word = agent.get(begin.map_or(0, |at| at + 1)..word_end);
        let next = agent.as_bytes().get(word_end);
        let mut people = self.lists.people.iter();
        !next.is_some_and(of_word)
            && !people.any(|person| word.is_some_and(|word| person.eq_ignore_ascii_case(word)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agents() -> Agents {
        crate::Rules::shipped().agents
    }

    #[test]
    fn user_agents_seen_in_the_wild() {
        for (text, what) in [
            (
                "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36",
                Agent::Browser,
            ),
            (
                "Mozilla/5.0 (iPhone; CPU iPhone OS 18_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148",
                Agent::Browser,
            ),
            (
                "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Thunderbird/128.4.0",
                Agent::Browser,
            ),
            (
                "Mozilla/4.0 (compatible; MSIE 7.0; Windows NT 10.0; WOW64; Trident/7.0; Microsoft Outlook 16.0.4266)",
                Agent::Browser,
            ),
            (
                "Mozilla/5.0 (Linux; Android 9; CUBOT X19) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/74.0.3729.157 Mobile Safari/537.36",
                Agent::Browser,
            ),
            ("Mozilla/5.0", Agent::Prefetcher),
            (
                "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/42.0.2311.135 Safari/537.36 Edge/12.246 Mozilla/5.0",
                Agent::Prefetcher,
            ),
            (
                "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)",
                Agent::ImageProxy,
            ),
            (
                "YahooMailProxy; https://help.yahoo.com/kb/yahoo-mail-proxy-SLN28749.html",
                Agent::ImageProxy,
            ),
            (
                "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; Googlebot/2.1; +http://www.google.com/bot.html) Chrome/130.0.0.0 Safari/537.36",
                Agent::Automated,
            ),
            (
                "Slackbot-LinkExpanding 1.0 (+https://api.slack.com/robots)",
                Agent::Automated,
            ),
            (
                "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) HeadlessChrome/120.0.0.0 Safari/537.36",
                Agent::Automated,
            ),
            ("python-requests/2.32.3", Agent::Automated),
            ("curl/8.5.0", Agent::Automated),
            ("Dalvik/2.1.0 (Linux; U; Android 14; Pixel 8)", Agent::Other),
            ("", Agent::Other),
        ] {
            assert_eq!(agents().read(text), what, "{text}");
        }
    }

    #[test]
    fn what_is_remembered_is_what_is_found_by_these_lists() {
        let (agents, none) = (agents(), Agents::new(Lists::default()).unwrap());
        // Far more than are remembered, each again and again, by two lists in turn.
        let of = |n: usize| match n % 3 {
            0 => format!("Mozilla/5.0 (Windows NT 10.0) AppleWebKit/{n}"),
            1 => format!("python-requests/{n}"),
            _ => format!("{}Googlebot/{n}", "x ".repeat(n % 200)),
        };
        for n in (0..2_000).chain(0..2_000) {
            let (text, same) = (of(n), of(n % 100));
            for text in [&text, &same, &same] {
                assert_eq!(agents.read(text), agents.find_out(text), "{text}");
                assert_eq!(none.read(text), none.find_out(text), "{text}");
            }
        }
    }

    #[test]
    fn a_bot_is_a_word_that_ends_so() {
        for (text, bot) in [
            ("gptbot/1.2", true),
            ("some bot", true),
            ("robots", true),
            ("robotics lab", false),
            ("bottle/1", false),
            ("cubot x19", false),
        ] {
            let automated = agents().read(text) == Agent::Automated;
            assert_eq!(automated, bot, "{text}");
        }
    }
}
