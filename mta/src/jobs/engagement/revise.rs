//! Verdicts that changed, on their way into the store; and history judged by new rules.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ::engagement::settle::{Judge, Judged};
use ::engagement::{Observed, Rules};
use model::{Actor, Fact, FactId, HitKind, MessageId, Revision};
use store::{Happened, MessageStory, Note, Shipment, Sign, StoreError};
use uuid::Uuid;

use super::{Hit, JobLease, NOTES, RECLASSIFY, Work, Worker, people, show};

/// Facts shipped at once.
const FACTS: usize = 1_000;
/// Messages whose stories are read at once.
const STORIES: usize = 1_000;

/// A verdict that changed.
pub(super) struct Revised {
    pub(super) event_id: Uuid,
    pub(super) kind: HitKind,
    pub(super) story: std::sync::Arc<MessageStory>,
    /// Whether it counts as a person's now; it was the other way round.
    pub(super) human: bool,
}

impl Worker<'_> {
    /// Ships the verdicts that differ from those that hold. `all`: also compares those that seem
    /// to be as they were.
    pub(super) async fn revise(
        &mut self,
        judged: &[(Judged, Option<Hit>)],
        all: bool,
    ) -> Result<Vec<Revised>, StoreError> {
        let mut by_message: BTreeMap<MessageId, Vec<&Judged>> = BTreeMap::new();
        for (judged, _) in judged {
            if all || judged.was != judged.verdict.actor {
                let of = by_message.entry(judged.trace.message).or_default();
                of.push(judged);
            }
        }
        let (mut facts, mut revised, mut doubtful) = (Vec::new(), Vec::new(), Vec::new());
        let messages: Vec<MessageId> = by_message.keys().copied().collect();
        for some in messages.chunks(STORIES) {
            for story in self.of.store.messages(some.to_vec()).await? {
                let message = named(&story);
                let Some(judged) = by_message.get(&message) else {
                    continue;
                };
                let story = std::sync::Arc::new(story);
                for revision in compare(&story, judged, self.of.clock.now()) {
                    let human = |actor| actor == Actor::Human;
                    let (was, is) = (human(revision.was), human(revision.verdict.actor));
                    if was && !is && !revision.others {
                        doubtful.push((message, revision.kind));
                    }
                    let of = judged.iter().find(|of| of.trace.id == revision.hit);
                    if let (true, Some(of)) = (was != is, of) {
                        revised.push(Revised {
                            event_id: of.trace.event_id,
                            kind: revision.kind,
                            story: story.clone(),
                            human: is,
                        });
                    }
                    facts.push(revision);
                }
            }
        }
        self.ship(facts).await?;
        self.confirm(doubtful).await?;
        Ok(revised)
    }

    /// A person's hit may have come while the last one's verdict was taken back: it counts.
    async fn confirm(&mut self, doubtful: Vec<(MessageId, HitKind)>) -> Result<(), StoreError> {
        let mut facts = Vec::new();
        for some in doubtful.chunks(STORIES) {
            let messages = some.iter().map(|(message, _)| *message).collect();
            let stories = self.of.store.messages(messages).await?;
            let stories = stories.iter().map(|story| (named(story), story));
            let stories: HashMap<MessageId, &MessageStory> = stories.collect();
            for (message, kind) in some {
                let Some(story) = stories.get(message) else {
                    continue;
                };
                let human = story
                    .hits
                    .iter()
                    .find(|kept| kept.hit.kind == *kind && kept.hit.verdict.actor == Actor::Human);
                facts.extend(human.map(|kept| Revision {
                    message: *message,
                    at: self.of.clock.now(),
                    hit: kept.id,
                    hit_at: kept.hit.at,
                    kind: *kind,
                    was: Actor::Human,
                    verdict: kept.hit.verdict.clone(),
                    others: true,
                }));
            }
        }
        self.ship(facts).await
    }

    async fn ship(&mut self, facts: Vec<Revision>) -> Result<(), StoreError> {
        for chunk in facts.chunks(FACTS) {
            let numbered = chunk.iter().map(|revision| {
                self.seq += 1;
                (self.seq, Fact::Revision(Box::new(revision.clone())))
            });
            let facts: Vec<_> = numbered.collect();
            let shipment = Shipment {
                journal: self.journal,
                through: self.seq,
                facts,
                windows: Vec::new(),
                finished: Vec::new(),
                now: self.of.clock.now(),
            };
            self.of.store.ship(shipment).await?;
            for revision in chunk {
                let (kind, actor) = (revision.kind, revision.verdict.actor);
                let counter = self.of.metrics.engagement_reclassified.at(kind, actor);
                counter.inc();
            }
        }
        Ok(())
    }

    /// Whether somebody asked for history to be judged anew.
    pub(super) async fn asked_to_reclassify(&self) -> Result<bool, StoreError> {
        let now = self.of.clock.now();
        Ok(self.of.store.note(NOTES, RECLASSIFY, now).await?.is_some())
    }

    /// Judges all hits that are kept by the rules in force now.
    pub(super) async fn reclassify(&mut self, held: &mut JobLease) -> Result<(), StoreError> {
        let rules = self.of.rules.load_full();
        tracing::info!(version = rules.version, "history is judged anew");
        let mut judge = Judge::new(self.of.settle);
        let (mut cursor, mut changed) = (None, 0);
        loop {
            if held.keep().await?.is_none() {
                return Ok(());
            }
            let page = self.read(cursor).await?;
            self.learn(&page.signs).await?;
            for sign in page.signs.iter().cloned() {
                let sign = judged_anew(&rules, sign);
                show(&mut judge, &self.links, &mut self.words, &sign);
            }
            let last = page.signs.last().map(Sign::recorded_at);
            // Behind the last event it is now. Hits that are not done waiting even then are settled
            // by the same rules in turn.
            let now = last.unwrap_or_else(|| self.of.clock.now());
            let judged = judge.due(&rules, now).into_iter();
            let judged: Vec<_> = judged.map(|of| (of, None)).collect();
            let revised = self.revise(&judged, true).await?;
            changed += revised.len();
            let mut docs = super::docs::Docs::new(&*self.of.store, self.of.clock.now());
            docs.prefetch(people::wanted(&Work::default(), &revised))
                .await?;
            for revised in &revised {
                people::revised(&mut docs, revised).await?;
            }
            docs.write(Some(&mut *held)).await?;
            if last.is_none() {
                break;
            }
            cursor = Some(page.next);
        }
        tracing::info!(changed, "history was judged anew");
        let done = Note {
            kind: NOTES.into(),
            key: RECLASSIFY.into(),
            value: Box::default(),
            expires_at: None,
        };
        self.of
            .store
            .put_notes(vec![done], self.of.clock.now())
            .await
    }
}

/// What differs from the verdicts that hold.
fn compare(story: &MessageStory, judged: &[&Judged], now: model::Timestamp) -> Vec<Revision> {
    let holds = story.hits.iter().map(|kept| {
        let hit = &kept.hit;
        (kept.id, (hit.kind, hit.verdict.actor))
    });
    let mut holds: HashMap<FactId, (HitKind, Actor)> = holds.collect();
    let mut revisions = Vec::new();
    for of in judged {
        let (id, verdict) = (of.trace.id, &of.verdict);
        let Some((kind, actor)) = holds.get_mut(&id) else {
            continue;
        };
        let (kind, was) = (*kind, std::mem::replace(actor, verdict.actor));
        if was == verdict.actor {
            continue;
        }
        let others = holds
            .iter()
            .any(|(other, (of, actor))| *other != id && *of == kind && *actor == Actor::Human);
        revisions.push(Revision {
            message: of.trace.message,
            at: now,
            hit: id,
            hit_at: of.trace.at,
            kind,
            was,
            verdict: verdict.clone(),
            others,
        });
    }
    revisions
}

/// A hit with the verdict of these rules on the request by itself. What its headers gave away is not
/// kept, so that stays.
fn judged_anew(rules: &Rules, mut sign: Sign) -> Sign {
    let Sign::Mail(mail) = &mut sign else {
        return sign;
    };
    let Happened::Hit(of) = &mut mail.what else {
        return sign;
    };
    let hit = &mut of.hit;
    let by_headers = hit
        .verdict
        .machine_reasons
        .iter()
        .any(|of| **of == *"prefetch");
    let network = hit.network.split('/').next().unwrap_or_default();
    let verdict = rules.judge(&Observed {
        kind: hit.kind,
        user_agent: &hit.user_agent,
        prefetch: by_headers,
        fetch_dest: None,
        address: network.parse::<IpAddr>().ok(),
    });
    // Unknown may have been said by a header, too.
    let kept = hit.verdict.actor == Actor::Unknown && verdict.actor == Actor::Human;
    if !kept {
        hit.verdict = verdict;
    }
    sign
}

fn named(story: &MessageStory) -> MessageId {
    MessageId {
        batch: story.batch.id,
        index: story.recipient.row.index,
    }
}
