//! The labelled corpus: what the shipped rules say of each trace. The table in `docs/tracking.md`
//! is made here; run with `UPDATE_DOCS=1` to write it.

use engagement::settle::{Judge, Trace};
use engagement::{Observed, Rules};
use model::{Actor, BatchId, FactId, HitKind, JournalId, MessageId, Timestamp};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Duration;

const CORPUS: &str = include_str!("corpus.toml");
const BEGIN: &str = "<!-- confusion matrix: made by crates/engagement/tests -->\n";
const END: &str = "<!-- end of the confusion matrix -->\n";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Corpus {
    agents: HashMap<String, String>,
    trace: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    truth: String,
    /// When the reply to the final dot was read.
    #[serde(default = "soon")]
    reply: i64,
    /// When an attempt failed for now.
    deferred: Option<i64>,
    #[serde(default)]
    undelivered: bool,
    /// The same hits at so many recipients.
    #[serde(default = "one")]
    recipients: u32,
    hits: Vec<HitForm>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HitForm {
    at: i64,
    link: Option<u16>,
    agent: String,
    #[serde(default = "home")]
    network: String,
    truth: Option<String>,
}

fn soon() -> i64 {
    40
}

fn one() -> u32 {
    1
}

fn home() -> String {
    "203.0.113.0/24".to_owned()
}

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(1_763_769_600_000 + millis)
}

/// What happens, in the order in which a store learns it.
enum Step<'a> {
    Deferred(MessageId),
    Delivered(MessageId, i64),
    Hit(MessageId, &'a HitForm),
}

/// The verdicts on the hits of a case, each with the truth.
fn judge(corpus: &Corpus, case: &Case, rules: &Rules) -> Vec<(String, Actor)> {
    let batch = BatchId::from_bytes([7; 16]);
    let mut steps: Vec<(i64, Step<'_>)> = Vec::new();
    for index in 0..case.recipients {
        let message = MessageId { batch, index };
        if let Some(at) = case.deferred {
            steps.push((at, Step::Deferred(message)));
        }
        if !case.undelivered {
            steps.push((case.reply, Step::Delivered(message, case.reply)));
        }
        steps.extend(
            case.hits
                .iter()
                .map(|hit| (hit.at, Step::Hit(message, hit))),
        );
    }
    steps.sort_by_key(|(at, _)| *at);
    let mut judge = Judge::new(Duration::from_secs(15));
    let mut verdicts: BTreeMap<u64, (String, Actor)> = BTreeMap::new();
    let mut collect = |judge: &mut Judge, now: Timestamp| {
        for judged in judge.due(rules, now) {
            let of = verdicts
                .entry(judged.trace.id.seq)
                .or_insert_with(|| (String::new(), judged.was));
            of.1 = judged.verdict.actor;
        }
    };
    let mut truths = HashMap::new();
    for (seq, (millis, step)) in (0_u64..).zip(&steps) {
        collect(&mut judge, at(*millis));
        match step {
            Step::Deferred(message) => judge.deferred(*message, at(*millis)),
            Step::Delivered(message, reply) => {
                judge.delivered(*message, Some(at(0)), at(*reply), at(*reply));
            }
            Step::Hit(message, hit) => {
                let agent = corpus.agents.get(&hit.agent).expect("a known agent");
                let kind = if hit.link.is_some() {
                    HitKind::Click
                } else {
                    HitKind::Open
                };
                let address = hit
                    .network
                    .split('/')
                    .next()
                    .and_then(|net| net.parse().ok());
                truths.insert(seq, hit.truth.clone().unwrap_or_else(|| case.truth.clone()));
                let trace = Trace {
                    id: FactId {
                        journal: JournalId::from_bytes([1; 16]),
                        seq,
                    },
                    event_id: uuid::Uuid::from_u128(seq.into()),
                    message: *message,
                    kind,
                    at: at(*millis),
                    recorded_at: at(*millis),
                    link: hit.link,
                    user_agent: agent.as_str().into(),
                    network: hit.network.as_str().into(),
                    verdict: rules.judge(&Observed {
                        kind,
                        user_agent: agent,
                        prefetch: false,
                        fetch_dest: None,
                        address,
                    }),
                };
                judge.hit(trace, false);
            }
        }
    }
    collect(&mut judge, at(10_000_000));
    let judged = verdicts.into_iter();
    judged
        .map(|(seq, (_, actor))| (truths[&seq].clone(), actor))
        .collect()
}

fn column(actor: Actor) -> usize {
    match actor {
        Actor::Human => 0,
        Actor::Machine => 1,
        Actor::Unknown => 2,
    }
}

#[test]
fn the_corpus_is_judged_as_the_document_says() {
    let corpus: Corpus = toml::from_str(CORPUS).expect("the corpus");
    let rules = Rules::shipped();
    let mut matrix = [[0_u32; 3]; 2];
    let mut missed = String::new();
    for case in &corpus.trace {
        let judged = judge(&corpus, case, &rules);
        let hits = case.hits.len() * usize::try_from(case.recipients).expect("few");
        assert_eq!(judged.len(), hits, "{}", case.name);
        let mut wrong = 0;
        for (truth, actor) in &judged {
            let row = usize::from(truth == "machine");
            matrix[row][column(*actor)] += 1;
            wrong += u32::from(row == 0 && *actor == Actor::Machine);
            wrong += u32::from(row == 1 && *actor == Actor::Human);
        }
        if wrong > 0 {
            missed.push_str(&format!("- {} ({wrong} of {hits})\n", case.name));
        }
    }
    // A person who is taken for a machine is lost; that must not happen in any known shape.
    assert_eq!(matrix[0][1], 0, "people taken for machines:\n{missed}");
    let row =
        |name: &str, of: [u32; 3]| format!("| {name} | {} | {} | {} |\n", of[0], of[1], of[2]);
    let table = format!(
        "\n{} traces, rules of version {}. Rows are the truth, columns the verdict.\n\n\
         | | human | machine | unknown |\n|---|---|---|---|\n{}{}\nTaken for the other:\n\n{missed}\n",
        corpus.trace.len(),
        rules.version,
        row("a person", matrix[0]),
        row("a machine", matrix[1]),
    );
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/tracking.md");
    let text = std::fs::read_to_string(&file).expect("the document");
    let (before, rest) = text.split_once(BEGIN).expect("its beginning");
    let (stands, after) = rest.split_once(END).expect("its end");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let text = format!("{before}{BEGIN}{table}{END}{after}");
        std::fs::write(&file, text).expect("written");
    } else {
        assert_eq!(stands, table, "run with UPDATE_DOCS=1");
    }
}
