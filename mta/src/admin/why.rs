//! `GET /v1/why`: what holds a message, a batch or a domain, and when it next moves.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use model::{BatchId, MessageId};

use super::Api;
use super::auth::{Caller, CanRead};
use super::params::Params;
use super::problem::{Answer, Code, Refusal};
use crate::explain::Explanation;

pub(super) async fn why(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    mut params: Params,
) -> Answer<Json<Explanation>> {
    let message = params.filled("message");
    let batch = params.filled("batch");
    let domain = params.filled("domain");
    params.finish()?;
    let explanation = match (message, batch, domain) {
        (Some(id), None, None) => of_message(&api, &caller, &id).await?,
        (None, Some(id), None) => of_batch(&api, &caller, &id).await?,
        (None, None, Some(name)) => {
            let found = api.explainer.of_domain(&name).await;
            found.ok_or_else(|| Refusal::not_found("domain or destination"))?
        }
        _ => {
            let detail = "name one of message, batch and domain";
            return Err(Refusal::new(Code::InvalidField, detail));
        }
    };
    Ok(Json(explanation))
}

async fn of_batch(api: &Api, caller: &Caller, id: &str) -> Answer<Explanation> {
    let id: BatchId = id.parse().map_err(|_| Refusal::not_found("batch"))?;
    let batch = api.store.batch(id).await?;
    let batch = batch.filter(|batch| caller.sees(&batch.head.account));
    let batch = batch.ok_or_else(|| Refusal::not_found("batch"))?;
    Ok(api.explainer.of_batch(&batch).await?)
}

async fn of_message(api: &Api, caller: &Caller, id: &str) -> Answer<Explanation> {
    let unknown = || Refusal::not_found("message");
    let id: MessageId = id.parse().map_err(|_| unknown())?;
    let batch = api.store.batch(id.batch).await?;
    let batch = batch.filter(|batch| caller.sees(&batch.head.account));
    let batch = batch.ok_or_else(unknown)?;
    let story = api.store.message(id).await?.ok_or_else(unknown)?;
    let explanation = api.explainer.of_message(&story, &batch).await?;
    explanation.ok_or_else(unknown)
}
