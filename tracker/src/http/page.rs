//! The page tag and page views (contract, section 7).
//!
//! Owns the script, and what a page may send: only sites that an account names are heard. A page
//! view names the browser by the cookie of the clicks; who objects (`Sec-GPC`) is neither named nor
//! recorded. Must not know whose browser it is.

use super::{Answer, Asked, Counted, Public, not_allowed, note, read};
use crate::hits::Viewed;
use crate::hits::visitor::Visitors;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Body;
use hyper::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_MAX_AGE, CACHE_CONTROL, CONTENT_TYPE, HeaderValue,
    ORIGIN, SET_COOKIE, VARY, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Response, StatusCode};
use service::metrics::{TrackerKind, TrackerResult};
use std::error::Error as StdError;

/// The tag: tells of each page that is shown, also where a site changes pages by script. `fetch`
/// with plain text needs no preflight and outlives the page.
const TAG: &str = r#"(function(){var d=document,s=d.currentScript,n=navigator,l;
if(n.globalPrivacyControl||s&&s.dataset.consent==="denied")return;
var u=s&&s.src?s.src.replace(/t\.js([?#].*)?$/,"p"):"/p";
function view(){var h=location.href;if(h===l)return;var r=l||d.referrer;l=h;
try{fetch(u,{method:"POST",credentials:"include",keepalive:true,headers:{"Content-Type":"text/plain"},
body:JSON.stringify({url:h,referrer:r,title:d.title})}).catch(function(){})}catch(e){}}
var p=history.pushState;if(p)history.pushState=function(){var x=p.apply(this,arguments);setTimeout(view,0);return x};
addEventListener("popstate",view);
if(d.prerendering)d.addEventListener("prerenderingchange",view,{once:true});else view();
window.hikyaku={view:view}})();
"#;

/// The sites that may send page views, and whose they are.
#[derive(Debug)]
pub(crate) struct Origins(Vec<(String, String)>);

impl Origins {
    /// Pairs of origin and account.
    pub(crate) fn of<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let own = |(origin, account): (&str, &str)| {
            (
                origin.trim_end_matches('/').to_ascii_lowercase(),
                account.to_owned(),
            )
        };
        Self(pairs.map(own).collect())
    }

    /// Whose site it is.
    fn account(&self, origin: &str) -> Option<&str> {
        let found = self.0.iter().find(|(known, _)| known == origin);
        found.map(|(_, account)| account.as_str())
    }
}

/// `GET /t.js`
pub(super) fn tag(asked: &Asked<'_>) -> Counted {
    if !matches!(asked.parts.method, Method::GET | Method::HEAD) {
        return not_allowed(TrackerKind::Page, "GET, HEAD");
    }
    let mut answer = Response::new(Full::new(Bytes::from_static(TAG.as_bytes())));
    let headers = answer.headers_mut();
    let media = HeaderValue::from_static("text/javascript; charset=utf-8");
    headers.insert(CONTENT_TYPE, media);
    let cache = HeaderValue::from_static("public, max-age=3600");
    headers.insert(CACHE_CONTROL, cache);
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(
        "cross-origin-resource-policy",
        HeaderValue::from_static("cross-origin"),
    );
    counted(answer, TrackerResult::Ok)
}

/// `POST /p`, and the preflight of those who send JSON as such.
pub(super) async fn view<B>(public: &Public, asked: &Asked<'_>, body: B) -> Counted
where
    B: Body + Send,
    B::Data: Send,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let headers = &asked.parts.headers;
    let origin = headers.get(ORIGIN).and_then(|value| value.to_str().ok());
    let origin = origin.map(str::to_ascii_lowercase).unwrap_or_default();
    let view = public.tenants.view();
    let Some(account) = view.origins.account(&origin).map(str::to_owned) else {
        return counted(empty(StatusCode::FORBIDDEN), TrackerResult::BadRequest);
    };
    let mut answer = empty(StatusCode::NO_CONTENT);
    allow(&mut answer, &origin);
    match asked.parts.method {
        Method::POST => {}
        Method::OPTIONS => {
            let allowed = answer.headers_mut();
            let set = [
                (ACCESS_CONTROL_ALLOW_METHODS, "POST"),
                (ACCESS_CONTROL_ALLOW_HEADERS, "content-type"),
                (ACCESS_CONTROL_MAX_AGE, "86400"),
            ];
            for (name, value) in set {
                allowed.insert(name, HeaderValue::from_static(value));
            }
            return counted(answer, TrackerResult::Ok);
        }
        _ => return not_allowed(TrackerKind::Page, "POST, OPTIONS"),
    }
    let viewed = match read(body).await {
        Ok(body) => viewed(&body).ok_or(StatusCode::BAD_REQUEST),
        Err(status) => Err(status),
    };
    let viewed = match viewed {
        Ok(viewed) => viewed,
        Err(status) => {
            *answer.status_mut() = status;
            return counted(answer, TrackerResult::BadRequest);
        }
    };
    if asked.said.objects {
        return counted(answer, TrackerResult::Ok);
    }
    let keyed = public.keyed.load();
    let known = keyed.visitors.read(headers);
    let Some(visitor) = known.or_else(|| Visitors::fresh(public.clock.now())) else {
        return counted(answer, TrackerResult::Ok);
    };
    let cookie = keyed
        .visitors
        .cookie(visitor, &asked.authority, asked.https);
    if let Ok(cookie) = HeaderValue::from_str(&cookie) {
        answer.headers_mut().insert(SET_COOKIE, cookie);
    }
    let recorded = public
        .recorder
        .page(&account, visitor, &viewed, asked.seen());
    note(recorded.await);
    counted(answer, TrackerResult::Ok)
}

fn counted(answer: Answer, result: TrackerResult) -> Counted {
    Counted {
        answer,
        kind: TrackerKind::Page,
        result,
    }
}

fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(VARY, HeaderValue::from_static("origin"));
    answer
}

/// The site may send cookies along and read the answer.
fn allow(answer: &mut Answer, origin: &str) {
    let Ok(origin) = HeaderValue::from_str(origin) else {
        return;
    };
    let headers = answer.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    let yes = HeaderValue::from_static("true");
    headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, yes);
}

/// Reads a page view; `None` when it is none.
fn viewed(body: &[u8]) -> Option<Viewed> {
    let told: serde_json::Value = serde_json::from_slice(body).ok()?;
    let text = |name: &str| {
        let text = told.get(name).and_then(serde_json::Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let url = text("url");
    let is_web = ["http://", "https://"].iter().any(|scheme| {
        let head = url.get(..scheme.len());
        head.is_some_and(|head| head.eq_ignore_ascii_case(scheme))
    });
    is_web.then(|| Viewed {
        url,
        referrer: text("referrer"),
        title: text("title"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_tag_is_small() {
        assert!(TAG.len() < 2_000, "{}", TAG.len());
    }

    #[test]
    fn a_page_view_has_an_address_of_the_web() {
        let good = viewed(br#"{"url":"HTTPS://shop.example/a","title":"A","more":1}"#);
        let good = good.expect("a page view");
        assert_eq!(
            (&*good.url, &*good.title, &*good.referrer),
            ("HTTPS://shop.example/a", "A", "")
        );
        for bad in [
            &b""[..],
            b"{}",
            b"[]",
            br#"{"url":7}"#,
            br#"{"url":"javascript:alert(1)"}"#,
            b"\xff",
        ] {
            assert!(viewed(bad).is_none());
        }
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_refused(body: Vec<u8>) {
            let _read = viewed(&body);
        }
    }
}
