//! The few pages that people see: short, in English and Japanese, nothing loaded from anywhere.

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Response, StatusCode};
use std::sync::LazyLock;

const STYLE: &str = "body{margin:0;min-height:100vh;display:grid;place-items:center;background:#f6f5f2;\
color:#1d2733;font:16px/1.6 system-ui,-apple-system,'Segoe UI','Hiragino Sans','Noto Sans JP',sans-serif}\
main{box-sizing:border-box;max-width:30rem;margin:1rem;padding:2rem 2.25rem;background:#fff;\
border:1px solid #e4e1da;border-radius:10px}\
h1{margin:0 0 .5rem;font-size:1.35rem;line-height:1.35}p{margin:.5rem 0}\
section+section{margin-top:1.25rem;padding-top:1.25rem;border-top:1px solid #eeece6}\
button{margin-top:1.5rem;width:100%;padding:.8rem 1rem;border:0;border-radius:7px;background:#b3341f;\
color:#fff;font:inherit;font-weight:600;cursor:pointer}\
button:hover,button:focus-visible{background:#8f2817}\
@media(prefers-color-scheme:dark){body{background:#14181d;color:#e6e8ea}\
main{background:#1d232b;border-color:#2d3540}section+section{border-color:#2d3540}}";

/// Nothing may run or load but this one style sheet, named by its hash.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let hash = STANDARD.encode(digest::digest(&digest::SHA256, STYLE.as_bytes()));
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{hash}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    );
    HeaderValue::from_str(&policy)
        .unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'"))
});

/// A page of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Page {
    /// Asks whether to unsubscribe.
    Ask,
    /// It is done.
    Done,
    /// The token is not ours, or there is nothing here.
    NotFound,
    /// No such thing can be done here.
    MethodNotAllowed,
    /// The body is too large, too slow or broken.
    BadRequest(StatusCode),
    /// We could not record it.
    Unavailable,
}

struct Text {
    status: StatusCode,
    english: (&'static str, &'static str),
    japanese: (&'static str, &'static str),
}

impl Page {
    fn text(self) -> Text {
        let (status, english, japanese) = match self {
            Self::Ask => (
                StatusCode::OK,
                (
                    "Unsubscribe?",
                    "Press the button and these emails will stop.",
                ),
                (
                    "配信を停止しますか？",
                    "ボタンを押すと、このメールの配信が停止されます。",
                ),
            ),
            Self::Done => (
                StatusCode::OK,
                (
                    "You are unsubscribed",
                    "You will get no more of these emails.",
                ),
                ("配信を停止しました", "今後、このメールは配信されません。"),
            ),
            Self::NotFound => (
                StatusCode::NOT_FOUND,
                (
                    "This link does not work",
                    "It may have been cut off on its way. Please try it from the original email.",
                ),
                (
                    "このリンクは無効です",
                    "リンクが途中で切れている可能性があります。元のメールからもう一度お試しください。",
                ),
            ),
            Self::MethodNotAllowed => (
                StatusCode::METHOD_NOT_ALLOWED,
                (
                    "This cannot be done here",
                    "Please use the link in the original email.",
                ),
                (
                    "この操作はできません",
                    "元のメールのリンクをご利用ください。",
                ),
            ),
            Self::BadRequest(status) => (
                status,
                ("That did not arrive well", "Please try again."),
                ("正しく受信できませんでした", "もう一度お試しください。"),
            ),
            Self::Unavailable => (
                StatusCode::SERVICE_UNAVAILABLE,
                (
                    "That did not work just now",
                    "Nothing was changed. Please try again in a minute.",
                ),
                (
                    "ただいま処理できません",
                    "変更は行われていません。しばらくしてからもう一度お試しください。",
                ),
            ),
        };
        Text {
            status,
            english,
            japanese,
        }
    }

    /// The page as an answer.
    pub(crate) fn answer(self) -> Response<Full<Bytes>> {
        let text = self.text();
        let mut response = Response::new(Full::new(Bytes::from(self.html(&text))));
        *response.status_mut() = text.status;
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/html; charset=utf-8"),
        );
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(CONTENT_SECURITY_POLICY, POLICY.clone());
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        // The address of the page is the token: it goes nowhere.
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        headers.insert(ROBOTS, HeaderValue::from_static("noindex"));
        response
    }

    fn html(self, text: &Text) -> String {
        let Text {
            english: (title, line),
            japanese: (title_ja, line_ja),
            ..
        } = text;
        let button = match self {
            // Without an action the form goes to the page's own address, whatever its path.
            Self::Ask => {
                "<form method=\"post\"><button name=\"unsubscribe\" value=\"page\">Unsubscribe / 配信停止</button></form>"
            }
            Self::Done
            | Self::NotFound
            | Self::MethodNotAllowed
            | Self::BadRequest(_)
            | Self::Unavailable => "",
        };
        format!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
<title>{title} / {title_ja}</title><style>{STYLE}</style></head><body><main>\
<section><h1>{title}</h1><p>{line}</p></section>\
<section lang=\"ja\"><h1>{title_ja}</h1><p>{line_ja}</p></section>{button}</main></body></html>"
        )
    }
}

/// Tells search engines to stay away.
pub(crate) const ROBOTS: HeaderName = HeaderName::from_static("x-robots-tag");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_load_nothing_and_only_one_asks() {
        let bad = Page::BadRequest(StatusCode::PAYLOAD_TOO_LARGE);
        let others = [
            Page::Done,
            Page::NotFound,
            Page::MethodNotAllowed,
            bad,
            Page::Unavailable,
        ];
        for page in others.into_iter().chain([Page::Ask]) {
            let html = page.html(&page.text());
            for loading in ["src=", "href=", "url(", "@import", "<script"] {
                assert!(!html.contains(loading), "{page:?} has {loading}");
            }
            assert_eq!(html.contains("<form"), page == Page::Ask);
            let response = page.answer();
            let policy = response.headers()[CONTENT_SECURITY_POLICY]
                .to_str()
                .expect("ASCII");
            assert!(
                policy.starts_with("default-src 'none'; style-src 'sha256-"),
                "{policy}"
            );
            assert!(policy.contains("form-action 'self'"));
        }
    }
}
