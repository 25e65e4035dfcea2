//! Rewriting over newsletters that others wrote, judged by a tokenizer and a verifier that we did
//! not write: every link leads where it led, every other byte stays, both signatures hold.

use crate::common::{BASE, compile, context, html, html_of, row, token};
use crate::dkim::{keys, verdicts};
use html5gum::{DefaultEmitter, Token, Tokenizer};
use std::path::{Path, PathBuf};

/// What rewriting may not change the number of.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// The links of `a`, `area` and VML, as a browser reads them.
    links: Vec<String>,
    /// Everything else, in order.
    rest: Vec<String>,
}

/// Reads HTML, and what conditional comments have for Outlook.
fn read(html: &str, seen: &mut Seen) {
    let mut emitter: DefaultEmitter = DefaultEmitter::default();
    emitter.naively_switch_states(true);
    for Ok(token) in Tokenizer::new_with_emitter(html, emitter) {
        match token {
            Token::StartTag(mut tag) => {
                let name = String::from_utf8_lossy(&tag.name).into_owned();
                let has_link = matches!(name.as_str(), "a" | "area") || name.starts_with("v:");
                let href = tag.attributes.remove(&b"href"[..]).filter(|_| has_link);
                if let Some(href) = href {
                    seen.links
                        .push(String::from_utf8_lossy(&href.value).into_owned());
                }
                seen.rest.push(format!("{tag:?}"));
            }
            Token::Comment(text) => {
                let text = String::from_utf8_lossy(&text.value).into_owned();
                match text.split_once("]>") {
                    Some((head, inner))
                        if head.trim_start().to_ascii_lowercase().starts_with("[if") =>
                    {
                        let inner = inner
                            .rfind("<![")
                            .and_then(|end| inner.get(..end))
                            .unwrap_or(inner);
                        read(inner, seen);
                    }
                    Some(_) | None => seen.rest.push(text),
                }
            }
            Token::Error(_) => {}
            other => seen.rest.push(format!("{other:?}")),
        }
    }
}

fn seen(html: &str) -> Seen {
    let mut seen = Seen {
        links: Vec::new(),
        rest: Vec::new(),
    };
    read(html, &mut seen);
    seen
}

/// The links of `source` that are to be tracked.
fn trackable(source: &Seen) -> Vec<String> {
    let is_http = |link: &&String| {
        let (scheme, rest) = link.split_once("://").unwrap_or_default();
        let http = ["http", "https"]
            .iter()
            .any(|known| known.eq_ignore_ascii_case(scheme));
        http && !rest.is_empty() && !rest.starts_with(['/', '?', '#', '\\', ' '])
    };
    // As a browser reads a URL: without blanks around it, and without line breaks in it.
    let clean = |link: &String| {
        link.trim_matches(|c| c <= ' ')
            .replace(['\n', '\r', '\t'], "")
    };
    source
        .links
        .iter()
        .map(clean)
        .collect::<Vec<_>>()
        .iter()
        .filter(is_http)
        .cloned()
        .collect()
}

/// Puts back what each tracker URL stands for, from the source itself, and returns the targets.
/// Knows nothing of HTML but where an attribute's value ends.
fn compare(source: &str, html: &str) -> Result<Vec<String>, String> {
    let mut targets = Vec::new();
    let (mut source, mut html) = (source, html);
    let same = |source: &mut &str, expected: &str| {
        let rest = source.strip_prefix(expected);
        *source = rest.ok_or_else(|| format!("{expected:?} became another at {:.60?}", *source))?;
        Ok::<_, String>(())
    };
    while let Some((before, rest)) = html.split_once(BASE) {
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !"/-_".contains(c));
        let (url, after) = rest.split_at(end.unwrap_or(rest.len()));
        if url.starts_with("/o/") {
            let before = before
                .strip_suffix("<img src=\"")
                .ok_or("a pixel elsewhere")?;
            same(&mut source, before)?;
            html = after.split_once('>').ok_or("a pixel without an end")?.1;
            continue;
        }
        same(&mut source, before)?;
        targets.push(token(&format!("{BASE}{url}")).token().target.to_owned());
        let value_end = match before.chars().next_back() {
            Some(quote @ ('"' | '\'')) => source.find(quote),
            _ => source.find(|c: char| c.is_ascii_whitespace() || c == '>'),
        };
        source = source
            .get(value_end.ok_or("a value without an end")?..)
            .unwrap_or_default();
        html = after;
    }
    // A part of a message ends with a line break.
    let (left, found) = (source.trim_end_matches('\n'), html.trim_end_matches('\n'));
    if left == found {
        Ok(targets)
    } else {
        Err(format!("{left:.60?} became {found:.60?}"))
    }
}

/// How many links of the document are tracked, after all checks.
async fn check(
    source: &str,
    keys: &[content::dkim::Key],
    zone: &crate::dkim::Zone,
) -> Result<usize, String> {
    // The template language is not theirs.
    let template = if ["{{", "{%", "{#"].iter().any(|tag| source.contains(tag)) {
        format!(
            "{{% raw %}}{}{{% endraw %}}",
            source.replace("endraw", "end-raw")
        )
    } else {
        source.to_owned()
    };
    let source = template
        .strip_prefix("{% raw %}")
        .and_then(|inner| inner.strip_suffix("{% endraw %}"))
        .unwrap_or(&template)
        .replace("\r\n", "\n")
        .replace('\r', "\n");
    let context = context();
    let mut message = compile(&html(&template))
        .render(&row("{}"), &context)
        .map_err(|error| error.to_string())?;
    message
        .sign("brand.example", keys, context.released_at)
        .map_err(|error| error.to_string())?;
    let wire = message.into_bytes();
    if verdicts(&wire, zone).await != [true, true] {
        return Err("a signature does not hold".to_owned());
    }
    let rewritten = html_of(&String::from_utf8_lossy(&wire));
    let targets = compare(&source, &rewritten)?;
    let before = seen(source.trim_end());
    if targets != trackable(&before) {
        return Err(format!(
            "{targets:#?}\nin place of\n{:#?}",
            trackable(&before)
        ));
    }
    // What a mail program makes of it is the same but for the links.
    let after = seen(without_pixel(&rewritten).trim_end());
    if after.rest != before.rest || after.links.len() != before.links.len() {
        return Err("a mail program sees another document".to_owned());
    }
    Ok(targets.len())
}

/// Where a template leaves a place for a link, a link.
fn with_links(source: &str) -> String {
    let mut pieces = source.split("href=\"#\"");
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.enumerate().fold(first, |whole, (number, piece)| {
        whole + &format!("href=\"https://a.example/{number}?a=1&amp;b=é\"") + piece
    })
}

fn without_pixel(html: &str) -> String {
    match html.split_once(&format!("<img src=\"{BASE}/o/")) {
        Some((before, rest)) => format!("{before}{}", rest.split_once('>').expect("an end").1),
        None => html.to_owned(),
    }
}

fn documents(below: &Path, found: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(below).unwrap_or_else(|error| {
        panic!(
            "{}: {error}: run crates/content/tests/corpora/fetch.sh",
            below.display()
        )
    });
    for entry in entries {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            // The manuals of packages are no mail.
            if path.file_name().is_none_or(|name| name != "docs") {
                documents(&path, found);
            }
        } else if path
            .extension()
            .is_some_and(|end| end == "html" || end == "htm" || end == "hbs")
        {
            found.push(path);
        }
    }
}

async fn check_all(below: &Path) -> (usize, usize) {
    let (keys, zone) = keys();
    let mut paths = Vec::new();
    documents(below, &mut paths);
    paths.sort();
    let (mut links, mut failures) = (0, Vec::new());
    for path in &paths {
        let bytes = std::fs::read(path).expect("a file");
        match check(&with_links(&String::from_utf8_lossy(&bytes)), &keys, &zone).await {
            Ok(count) => links += count,
            Err(why) => failures.push(format!("{}: {why}", path.display())),
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {}:\n{}",
        failures.len(),
        paths.len(),
        failures.join("\n")
    );
    (paths.len(), links)
}

#[tokio::test]
async fn hard_cases() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/hard");
    assert_eq!(check_all(&here).await, (3, 35));
}

/// The packages are pinned, so the numbers are too: a document that is not read is a failure.
#[tokio::test]
async fn newsletters_of_others() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/corpora");
    let (documents, links) = check_all(&corpora).await;
    assert!(
        documents >= 399 && links >= 655,
        "{documents} documents with {links} links"
    );
}
