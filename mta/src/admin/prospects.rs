//! People, as far as their interest is known: one, and searches.
//!
//! Owns how a search reads: page by page over all that is kept of an account, so memory does not
//! grow with it. Must not decide what counts: `engagement` does.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use engagement::prospect::{Entry, Points, Prospect};
use model::units::parse_duration;
use model::{DeliveryStatus, EventKind, Timestamp, VisitorId};
use serde::Serialize;
use store::{Note, Store, StoreError, SuppressionQuery};

use super::auth::CanRead;
use super::consent::Said;
use super::params::{NoParams, PAGE_MAX, Params, Segment};
use super::problem::{Answer, Refusal};
use super::rows::{self, Form, Table};
use super::{Api, List};
use crate::jobs::engagement::{PROSPECTS, kind_of, normalised};

/// People looked through for one page: a search that finds little answers with a short page and a
/// cursor.
const LOOKED_THROUGH: usize = 20_000;
/// Read from the store at once.
const CHUNK: u32 = 500;

/// `GET /v1/prospects/{prospect_id}`
#[derive(Serialize)]
pub(super) struct ProspectView {
    #[serde(flatten)]
    row: FoundView,
    mailable: bool,
    /// The most that may be kept of the person, where that was said.
    tracking: Option<Said>,
    last_delivered_at: Option<Timestamp>,
    visitors: Vec<VisitorView>,
    campaigns: Vec<CampaignView>,
    timeline: Vec<EntryView>,
}

/// A person in a search.
#[derive(Debug, Serialize)]
pub(super) struct FoundView {
    prospect_id: String,
    email: Option<String>,
    score: u64,
    status: DeliveryStatus,
    last_human_activity: Option<Timestamp>,
    opened: bool,
    clicked: bool,
    replied: bool,
}

#[derive(Serialize)]
struct VisitorView {
    visitor: VisitorId,
    binding_id: String,
    since: Timestamp,
}

#[derive(Serialize)]
struct CampaignView {
    campaign: Option<String>,
    opened: bool,
    clicked: bool,
    replied: bool,
}

#[derive(Serialize)]
struct EntryView {
    event_id: String,
    r#type: Option<EventKind>,
    at: Timestamp,
    campaign: Option<String>,
    message_id: Option<String>,
    url: Option<String>,
    visitor: Option<VisitorId>,
    /// Whether it counts as done by the person.
    human: bool,
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

impl From<&Entry> for EntryView {
    fn from(entry: &Entry) -> Self {
        Self {
            event_id: entry.event_id.to_string(),
            r#type: entry.kind(),
            at: entry.at,
            campaign: some(&entry.campaign),
            message_id: entry.message.map(|id| id.to_string()),
            url: some(&entry.url),
            visitor: entry.visitor,
            human: entry.human,
        }
    }
}

impl FoundView {
    fn of(
        id: &str,
        person: &Prospect,
        campaign: Option<&str>,
        points: &Points,
        now: Timestamp,
    ) -> Self {
        let counts = person
            .campaigns
            .iter()
            .filter(|of| campaign.is_none_or(|name| *of.name == *name));
        let did = |what: fn(&engagement::prospect::InCampaign) -> bool| counts.clone().any(what);
        Self {
            prospect_id: id.to_owned(),
            email: some(&person.email),
            score: person.score(points, now),
            status: person.delivery_status(),
            last_human_activity: person.last_human_at,
            opened: did(|of| of.opened),
            clicked: did(|of| of.clicked),
            replied: did(|of| of.replied),
        }
    }
}

pub(super) async fn one(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<Json<ProspectView>> {
    let now = api.clock.now();
    let kind = kind_of(PROSPECTS, &caller.account);
    let note = api.store.note(&kind, &id, now).await?;
    let person = note.and_then(|note| Prospect::from_bytes(&note.value));
    let person = person.ok_or_else(|| Refusal::not_found("prospect"))?;
    let email = normalised(&person.email);
    let consent = api.store.consent(&caller.account, &email).await?;
    let points = &api.engagement.load().points;
    let visitors = person.visitors.iter().rev().map(|seen| VisitorView {
        visitor: seen.visitor,
        binding_id: seen.binding.to_string(),
        since: seen.since,
    });
    let campaigns = person.campaigns.iter().rev().map(|of| CampaignView {
        campaign: some(&of.name),
        opened: of.opened,
        clicked: of.clicked,
        replied: of.replied,
    });
    Ok(Json(ProspectView {
        row: FoundView::of(&id, &person, None, points, now),
        mailable: is_mailable(&*api.store, &caller.account, &person).await?,
        tracking: consent.map(Into::into),
        last_delivered_at: person.last_delivered_at,
        visitors: visitors.collect(),
        campaigns: campaigns.collect(),
        timeline: person.timeline.iter().rev().map(Into::into).collect(),
    }))
}

/// Not suppressed, not unsubscribed, not bounced.
async fn is_mailable(
    store: &dyn Store,
    account: &str,
    person: &Prospect,
) -> Result<bool, StoreError> {
    let bounced = match person.delivery_status() {
        DeliveryStatus::InvalidAddress | DeliveryStatus::Error | DeliveryStatus::Spam => true,
        DeliveryStatus::Unconfirmed | DeliveryStatus::Ok | DeliveryStatus::TemporaryError => false,
    };
    let email: Result<model::EmailAddress, _> = person.email.parse();
    let (false, Ok(email)) = (bounced, email) else {
        return Ok(false);
    };
    let query = SuppressionQuery {
        account: account.to_owned(),
        email: Some(email.normalised().into_owned()),
        after: None,
        limit: 1,
    };
    Ok(store.suppressions(query).await?.items.is_empty())
}

/// Whose mail may be sent, or what became of the last.
#[derive(Debug, Clone, Copy)]
enum Standing {
    Mailable,
    Unmailable,
    Last(DeliveryStatus),
}

impl std::str::FromStr for Standing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "mailable" => Ok(Self::Mailable),
            "unmailable" => Ok(Self::Unmailable),
            other => {
                let status: Result<DeliveryStatus, _> = other.parse();
                status.map(Self::Last).map_err(|_| {
                    format!("{other:.40?} is neither mailable, unmailable nor a delivery status")
                })
            }
        }
    }
}

/// A search.
#[derive(Debug, Clone)]
struct Search {
    account: String,
    min_score: Option<u64>,
    max_score: Option<u64>,
    opened: Option<bool>,
    clicked: Option<bool>,
    replied: Option<bool>,
    campaign: Option<String>,
    inactive_for: Option<Duration>,
    standing: Option<Standing>,
    points: Points,
    now: Timestamp,
}

impl Search {
    /// The person, if the search wants it.
    async fn want(&self, store: &dyn Store, note: &Note) -> Result<Option<FoundView>, StoreError> {
        let Some(person) = Prospect::from_bytes(&note.value) else {
            return Ok(None);
        };
        let campaign = self.campaign.as_deref();
        let found = FoundView::of(&note.key, &person, campaign, &self.points, self.now);
        let flag = |wanted: Option<bool>, is: bool| wanted.is_none_or(|wanted| wanted == is);
        let active = |idle: Duration| {
            let since = person.last_human_at;
            since.is_some_and(|at| at + idle > self.now)
        };
        let mut wanted = self.min_score.is_none_or(|min| found.score >= min)
            && self.max_score.is_none_or(|max| found.score <= max)
            && flag(self.opened, found.opened)
            && flag(self.clicked, found.clicked)
            && flag(self.replied, found.replied)
            && campaign.is_none_or(|name| person.campaigns.iter().any(|of| *of.name == *name))
            && !self.inactive_for.is_some_and(active);
        wanted = wanted
            && match self.standing {
                None => true,
                Some(Standing::Last(status)) => status == found.status,
                Some(Standing::Mailable) => is_mailable(store, &self.account, &person).await?,
                Some(Standing::Unmailable) => !is_mailable(store, &self.account, &person).await?,
            };
        Ok(wanted.then_some(found))
    }

    /// At most `limit` people after a key, and the key to go on from.
    async fn page(
        &self,
        store: &dyn Store,
        mut after: Option<String>,
        limit: usize,
    ) -> Result<(Vec<FoundView>, Option<String>), StoreError> {
        let kind = kind_of(PROSPECTS, &self.account);
        let (mut found, mut looked) = (Vec::new(), 0);
        loop {
            let page = store
                .notes_after(&kind, after.as_deref(), CHUNK, self.now)
                .await?;
            looked += page.items.len();
            for note in &page.items {
                found.extend(self.want(store, note).await?);
                if found.len() >= limit {
                    return Ok((found, Some(note.key.to_string())));
                }
            }
            after = page.next;
            if after.is_none() || looked >= LOOKED_THROUGH {
                return Ok((found, after));
            }
        }
    }
}

/// `GET /v1/prospects`
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    headers: HeaderMap,
    mut params: Params,
) -> Answer<Response> {
    let search = Search {
        account: caller.account.to_string(),
        min_score: params.parsed("min_score"),
        max_score: params.parsed("max_score"),
        opened: params.flag("opened"),
        clicked: params.flag("clicked"),
        replied: params.flag("replied"),
        campaign: params.text("campaign"),
        inactive_for: params.read("inactive_for", |text| {
            parse_duration(text).map_err(|error| error.to_string())
        }),
        standing: params.parsed("status"),
        points: api.engagement.load().points.clone(),
        now: api.clock.now(),
    };
    let after = params.read("cursor", read_cursor);
    let limit = usize::try_from(params.limit()).unwrap_or(1);
    params.finish()?;
    match Form::wanted(&headers) {
        Form::Page => {
            let (items, next) = search.page(&*api.store, after, limit).await?;
            let next_cursor = next.map(|key| URL_SAFE_NO_PAD.encode(key));
            Ok(Json(List { items, next_cursor }).into_response())
        }
        Form::Whole(table) => Ok(whole(&api, search, after, table)),
    }
}

fn read_cursor(text: &str) -> Result<String, String> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok();
    let key = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
    key.ok_or_else(|| "is no cursor of prospects".to_owned())
}

fn whole(api: &Api, search: Search, after: Option<String>, table: Table) -> Response {
    let store = Arc::clone(&api.store);
    let most = usize::try_from(PAGE_MAX).unwrap_or(1);
    rows::whole(table, (search, after), move |(search, after)| {
        let store = Arc::clone(&store);
        async move {
            let (rows, next) = search.page(&*store, after, most).await?;
            Ok::<_, StoreError>((rows, next.map(|next| (search, Some(next)))))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standing_is_a_word() {
        for (word, good) in [
            ("mailable", true),
            ("unmailable", true),
            ("ok", true),
            ("", false),
        ] {
            assert_eq!(word.parse::<Standing>().is_ok(), good, "{word}");
        }
        assert_eq!(
            read_cursor(&URL_SAFE_NO_PAD.encode("p-1")),
            Ok("p-1".to_owned())
        );
        assert!(read_cursor("!").is_err());
    }
}
