//! What user agents say of themselves, by the lists of the rules. All texts are lower case and
//! compared so.

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

/// The lists of user agents.
#[derive(Debug, Clone, Default)]
pub(crate) struct Agents {
    pub(crate) prefetchers: Texts,
    pub(crate) image_proxies: Texts,
    pub(crate) automated: Texts,
    /// Parts of what persons use, which other rules would take for machines.
    pub(crate) people: Vec<String>,
}

/// What a user agent is, or has in it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Texts {
    pub(crate) whole: Vec<String>,
    pub(crate) parts: Vec<String>,
}

impl Texts {
    fn know(&self, agent: &str) -> bool {
        self.whole.iter().any(|whole| whole == agent)
            || self.parts.iter().any(|part| agent.contains(part.as_str()))
    }
}

impl Agents {
    /// Reads a user agent.
    pub(crate) fn read(&self, user_agent: &str) -> Agent {
        let agent = user_agent.trim().to_ascii_lowercase();
        let has = |parts: &[&str]| parts.iter().any(|part| agent.contains(part));
        if self.prefetchers.know(&agent) {
            Agent::Prefetcher
        } else if self.image_proxies.know(&agent) {
            Agent::ImageProxy
        } else if self.automated.know(&agent) || self.names_a_bot(&agent) {
            Agent::Automated
        } else if (agent.starts_with("mozilla/") || agent.starts_with("opera/")) && has(ENGINES) {
            Agent::Browser
        } else {
            Agent::Other
        }
    }

    /// Whether some word ends in `bot` or `bots`: `Googlebot/2.1`, `bot.html`, but not `robotics`.
    fn names_a_bot(&self, agent: &str) -> bool {
        agent
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|word| !self.people.iter().any(|person| person == word))
            .any(|word| word.ends_with("bot") || word.ends_with("bots"))
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
    fn a_bot_is_a_word_that_ends_so() {
        for (text, bot) in [
            ("gptbot/1.2", true),
            ("some bot", true),
            ("robots", true),
            ("robotics lab", false),
            ("bottle/1", false),
            ("cubot x19", false),
        ] {
            assert_eq!(agents().names_a_bot(text), bot, "{text}");
        }
    }
}
