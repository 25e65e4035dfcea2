//! What user agents say of themselves: tables, each line with its source.
//!
//! A line that is wrong misjudges every recipient who uses that program, so a line needs a source
//! and stays narrow. All texts are lower case and compared so.

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

/// Whole user agents of fetchers that come on their own, ahead of the person.
const PREFETCHERS: &[&str] = &[
    // Apple Mail Privacy Protection downloads all images in the background, read or unread, and
    // shows only this (wordtothewise.com/2021/09/apple-mpp; support.apple.com/guide/mail).
    "mozilla/5.0",
    // Gmail fetching on arrival, before anyone looked (mautic/mautic#10245,
    // ankane/ahoy_email#139); no browser has this order of parts.
    "mozilla/5.0 (windows nt 10.0; win64; x64) applewebkit/537.36 (khtml, like gecko) chrome/42.0.2311.135 safari/537.36 edge/12.246 mozilla/5.0",
];

/// Parts of the user agents of proxies that fetch for a person.
const IMAGE_PROXIES: &[&str] = &[
    // browscap/browscap#1108: the same text whatever the person uses. Fetches when the mail is
    // shown, but sometimes on arrival too (gophish/gophish#1390), so neither is certain.
    "googleimageproxy",
    "via ggpht.com",
    // help.yahoo.com/kb/yahoo-mail-proxy-SLN28749.html
    "yahoomailproxy",
];

/// Parts of the user agents of programs that act alone and say so.
const AUTOMATED: &[&str] = &[
    // What crawlers call themselves (github.com/monperrus/crawler-user-agents); `bot` is looked
    // for with care, see `names_a_bot`.
    "crawler",
    "spider",
    "slurp",
    "scrapy",
    "facebookexternalhit",
    "whatsapp/",
    "mediapartners-google",
    "google-read-aloud",
    "google favicon",
    "googleother",
    // Microsoft's link and page previews (crawler-user-agents).
    "bingpreview",
    "skypeuripreview",
    "microsoftpreview",
    "ms-office; ms-teams",
    // Mail security scanners that show a name; most do not.
    "barracuda",
    "proofpoint",
    "mimecast",
    "safelinks",
    "urlscan",
    "censysinspect",
    "zgrab",
    "masscan",
    "nmap scripting engine",
    "expanse, a palo alto",
    "virustotal",
    // Browsers without a person before them, and their drivers (crawler-user-agents).
    "headlesschrome",
    "phantomjs",
    "electron/headless",
    "lighthouse",
    // Monitors.
    "uptime-kuma",
    "site24x7",
    "statuscake",
    "nagios",
    "check_http",
    // HTTP libraries under their own name: the defaults of each project.
    "curl/",
    "wget/",
    "libcurl",
    "httpie/",
    "python-requests",
    "python-urllib",
    "python-httpx",
    "aiohttp",
    "go-http-client",
    "go-resty",
    "java/",
    "jakarta commons-httpclient",
    "apache-httpclient",
    "google-http-java-client",
    "libwww-perl",
    "lwp::simple",
    "php/",
    "guzzlehttp",
    "ruby",
    "faraday v",
    "node-fetch",
    "undici",
    "axios/",
    "got (https://",
    "postmanruntime",
    "insomnia/",
    "restsharp",
    "winhttp",
    "powershell/",
    "dart/",
    "hyper/",
    "reqwest/",
];

/// Phones whose names end in `bot` (JayBizzle/Crawler-Detect and omrilotan/isbot keep the same
/// exception).
const NOT_BOTS: &[&str] = &["cubot"];

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

/// Reads a user agent.
pub(crate) fn read(user_agent: &str) -> Agent {
    let agent = user_agent.trim().to_ascii_lowercase();
    let has = |parts: &[&str]| parts.iter().any(|part| agent.contains(part));
    if PREFETCHERS.contains(&agent.as_str()) {
        Agent::Prefetcher
    } else if has(IMAGE_PROXIES) {
        Agent::ImageProxy
    } else if has(AUTOMATED) || names_a_bot(&agent) {
        Agent::Automated
    } else if (agent.starts_with("mozilla/") || agent.starts_with("opera/")) && has(ENGINES) {
        Agent::Browser
    } else {
        Agent::Other
    }
}

/// Whether some word ends in `bot` or `bots`: `Googlebot/2.1`, `bot.html`, but not `robotics`.
fn names_a_bot(agent: &str) -> bool {
    agent
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !NOT_BOTS.contains(word))
        .any(|word| word.ends_with("bot") || word.ends_with("bots"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_lower_case() {
        let all = [PREFETCHERS, IMAGE_PROXIES, AUTOMATED, NOT_BOTS, ENGINES].concat();
        for text in all {
            assert_eq!(text, text.to_ascii_lowercase());
        }
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
            assert_eq!(read(text), what, "{text}");
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
            assert_eq!(names_a_bot(text), bot, "{text}");
        }
    }
}
