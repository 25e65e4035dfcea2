//! The HTTP API: authentication, problems, read-outs, health, metrics.
//!
//! Owns every route of the daemon and how a call becomes a question to the store. Must not hold
//! state of its own, and must not know how mail is sent.

pub(crate) mod abtests;
pub(crate) mod auth;
mod batches;
mod body;
mod classify;
mod consent;
mod destinations;
mod events;
mod health;
pub(crate) mod messages;
mod openapi;
mod params;
pub(crate) mod problem;
mod prospects;
mod recipients;
pub(crate) mod report;
mod rows;
pub(crate) mod server;
mod suppressions;
mod tenants;
mod told;
mod trace;
mod webhooks;
mod why;

use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::Router;
use axum::extract::State;
use axum::handler::Handler;
use axum::http::Method;
use axum::routing::{MethodFilter, MethodRouter, on};
use serde::Serialize;
use service::clock::SharedClock;
use service::metrics::Metrics;
use service::tasks::Shutdown;
use store::{BatchChange, Store};

use crate::classify::Rules;
use crate::explain::ask::Explainer;
use crate::intake::submit::Intake;
use crate::tenants::Tenants;
use auth::{CanSubmit, Keys};
use params::{NoParams, Segment};
use problem::{Code, Refusal};
pub(crate) use webhooks::Hooks;

/// What readiness asks besides the store.
pub(crate) struct Probe {
    /// Its name in `/readyz`.
    pub(crate) name: &'static str,
    /// What is wrong, if anything.
    pub(crate) trouble: Box<dyn Fn() -> Option<String> + Send + Sync>,
}

/// What every call may use.
pub(crate) struct Api {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: SharedClock,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) shutdown: Shutdown,
    pub(crate) keys: Arc<Keys>,
    pub(crate) tenants: Arc<Tenants>,
    pub(crate) reports: report::Reports,
    pub(crate) looks: abtests::Looks,
    pub(crate) intake: Arc<Intake>,
    pub(crate) rules: Arc<ArcSwap<Rules>>,
    pub(crate) probes: Vec<Probe>,
    pub(crate) explainer: Explainer,
    pub(crate) hooks: Hooks,
    pub(crate) engagement: Arc<ArcSwap<engagement::Rules>>,
    /// What callers tell is taken one at a time.
    pub(crate) telling: tokio::sync::Semaphore,
}

/// A page of a list.
#[derive(Debug, Serialize)]
struct List<T> {
    items: Vec<T>,
    next_cursor: Option<String>,
}

/// Routes, and their names for whoever compares them with the specification.
#[derive(Default)]
struct Routes {
    router: Router<Arc<Api>>,
    names: Vec<(Method, &'static str)>,
}

impl Routes {
    fn at<H, T>(mut self, method: Method, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, Arc<Api>>,
        T: 'static,
    {
        // Only methods of the standard are named below.
        let filter = MethodFilter::try_from(method.clone()).unwrap_or(MethodFilter::TRACE);
        let route: MethodRouter<Arc<Api>> = on(filter, handler);
        self.router = self.router.route(path, route);
        self.names.push((method, path));
        self
    }

    fn change(self, path: &'static str, change: BatchChange) -> Self {
        let handler =
            move |State(api): State<Arc<Api>>,
                  CanSubmit(caller): CanSubmit,
                  Segment(id): Segment,
                  _: NoParams| { batches::change(api, caller, id, change) };
        self.at(Method::POST, path, handler)
    }
}

fn routes() -> Routes {
    Routes::default()
        .at(Method::POST, "/v1/batches", batches::submit)
        .at(Method::GET, "/v1/batches", batches::list)
        .at(Method::GET, "/v1/batches/{id}", batches::one)
        .at(
            Method::POST,
            "/v1/batches/{id}/recipients",
            batches::add_part,
        )
        .change("/v1/batches/{id}/start", BatchChange::Start)
        .change("/v1/batches/{id}/pause", BatchChange::Pause)
        .change("/v1/batches/{id}/resume", BatchChange::Resume)
        .change("/v1/batches/{id}/cancel", BatchChange::Cancel)
        .change("/v1/batches/{id}/archive", BatchChange::Archive)
        .change("/v1/batches/{id}/unarchive", BatchChange::Unarchive)
        .at(Method::GET, "/v1/batches/{id}/ab_test", abtests::one)
        .at(
            Method::POST,
            "/v1/batches/{id}/ab_test/decide",
            abtests::decide,
        )
        .at(Method::GET, "/v1/batches/{id}/recipients", recipients::list)
        .at(Method::GET, "/v1/batches/{id}/report", report::report)
        .at(Method::POST, "/v1/batches/{id}/proof", batches::proof)
        .at(Method::POST, "/v1/messages", batches::submit_one)
        .at(Method::GET, "/v1/messages/{message_id}", messages::message)
        .at(Method::GET, "/v1/recipients/{email}", messages::person)
        .at(Method::DELETE, "/v1/recipients/{email}", messages::erase)
        .at(Method::GET, "/v1/events", events::list)
        .at(Method::GET, "/v1/webhooks", webhooks::list)
        .at(Method::POST, "/v1/webhooks", webhooks::create)
        .at(Method::GET, "/v1/webhooks/{id}", webhooks::one)
        .at(Method::PATCH, "/v1/webhooks/{id}", webhooks::change)
        .at(Method::DELETE, "/v1/webhooks/{id}", webhooks::delete)
        .at(Method::POST, "/v1/webhooks/{id}/replay", webhooks::replay)
        .at(Method::POST, "/v1/events", told::tell)
        .at(Method::GET, "/v1/prospects", prospects::list)
        .at(Method::GET, "/v1/prospects/{prospect_id}", prospects::one)
        .at(Method::POST, "/v1/bindings/{id}/revoke", told::revoke)
        .at(Method::POST, "/v1/reclassify", told::reclassify)
        .at(Method::GET, "/v1/suppressions", suppressions::list)
        .at(Method::POST, "/v1/suppressions", suppressions::import)
        .at(Method::GET, "/v1/suppressions/{email}", suppressions::one)
        .at(Method::PUT, "/v1/suppressions/{email}", suppressions::put)
        .at(
            Method::DELETE,
            "/v1/suppressions/{email}",
            suppressions::delete,
        )
        .at(Method::GET, "/v1/tracking/{email}", consent::one)
        .at(Method::PUT, "/v1/tracking/{email}", consent::put)
        .at(Method::DELETE, "/v1/tracking/{email}", consent::delete)
        .at(Method::POST, "/v1/batches/{id}/retry", batches::retry)
        .at(Method::GET, "/v1/destinations", destinations::list)
        .at(Method::GET, "/v1/destinations/{domain}", destinations::one)
        .at(
            Method::POST,
            "/v1/destinations/{domain}/suspend",
            destinations::suspend,
        )
        .at(
            Method::POST,
            "/v1/destinations/{domain}/resume",
            destinations::resume,
        )
        .at(
            Method::POST,
            "/v1/destinations/{domain}/retry",
            destinations::retry,
        )
        .at(Method::GET, "/v1/accounts", tenants::accounts)
        .at(Method::POST, "/v1/accounts", tenants::add_account)
        .at(Method::GET, "/v1/accounts/{id}", tenants::account)
        .at(Method::PATCH, "/v1/accounts/{id}", tenants::patch_account)
        .at(Method::DELETE, "/v1/accounts/{id}", tenants::remove_account)
        .at(Method::GET, "/v1/keys", tenants::keys)
        .at(Method::POST, "/v1/keys", tenants::add_key)
        .at(Method::GET, "/v1/keys/{id}", tenants::key)
        .at(Method::PATCH, "/v1/keys/{id}", tenants::patch_key)
        .at(Method::DELETE, "/v1/keys/{id}", tenants::remove_key)
        .at(Method::GET, "/v1/why", why::why)
        .at(Method::GET, "/v1/trace", trace::trace)
        .at(Method::POST, "/v1/classify", classify::classify)
        .at(Method::GET, "/healthz", health::live)
        .at(Method::GET, "/readyz", health::ready)
        .at(Method::GET, "/metrics", health::metrics)
        .at(Method::GET, "/openapi.json", health::specification)
}

/// The whole API.
pub(crate) fn router(api: Arc<Api>) -> Router {
    routes()
        .router
        .method_not_allowed_fallback(|| async {
            Refusal::new(
                Code::MethodNotAllowed,
                "the path exists, the method does not",
            )
        })
        .fallback(|| async { Refusal::not_found("path") })
        .with_state(api)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_specification_and_the_router_name_the_same_calls() {
        let document: serde_json::Value = serde_json::from_str(openapi::DOCUMENT).expect("JSON");
        let paths = document["paths"].as_object().expect("paths");
        let specified: BTreeSet<String> = paths
            .iter()
            .flat_map(|(path, calls)| {
                let methods = calls
                    .as_object()
                    .expect("calls")
                    .keys()
                    .filter(|key| *key != "parameters");
                methods.map(move |method| format!("{} {path}", method.to_uppercase()))
            })
            .collect();
        let routed: BTreeSet<String> = routes()
            .names
            .iter()
            .map(|(method, path)| format!("{method} {path}"))
            .collect();
        assert_eq!(specified, routed);
    }
}
