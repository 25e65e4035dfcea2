//! CPU time to render, and to render and sign, a newsletter of some 10 KiB with ten links:
//! `cargo run --release -p content --example render_speed`.

use content::{Content, ContentSpec, Mailbox, RenderContext, Tracker, TrackingSpec, dkim};
use links::KeyRing;
use model::{BatchId, Row, Timestamp, TrackingMode};
use std::collections::BTreeMap;
use std::sync::Arc;

type Done = Result<(), Box<dyn std::error::Error>>;

/// CPU seconds of this process so far, from the kernel, so that a busy machine does not count.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    stat.split(' ')
        .next()
        .and_then(|nanos| nanos.parse::<f64>().ok())
        .unwrap_or(0.0)
        / 1e9
}

fn newsletter(japanese: bool) -> String {
    let sentence = if japanese {
        "飛脚は江戸時代の郵便屋さんです。"
    } else {
        "The courier runs with your letters today.\n"
    };
    let mut html =
        String::from("<html><body><p>Hello {{ name }}, you have {{ points }} points.</p>\n");
    for n in 0..10 {
        html.push_str(&format!(
            "<p>{}<a href=\"https://shop.example/products/{n}?color=red&amp;size=4\">Buy</a></p>\n",
            sentence.repeat(22)
        ));
    }
    html + "<p><a href=\"{{ unsubscribe_url }}\">Unsubscribe</a></p></body></html>\n"
}

fn spec(html: String) -> Result<ContentSpec, model::AddressError> {
    Ok(ContentSpec {
        from: Mailbox { email: "news@brand.example".parse()?, name: Some("Brand".into()) },
        reply_to: None,
        subject: "Hello {{ name }}".into(),
        html: Some(html),
        text: Some("Hello {{ name }}, you have {{ points }} points.\n\nUnsubscribe: {{ unsubscribe_url }}\n".into()),
        headers: BTreeMap::new(),
        vars: serde_json::Map::new(),
        tracking: TrackingSpec::default(),
        list_unsubscribe: true,
        feedback_id: Some("spring:batch:bulk:default".into()),
        attachments: Vec::new(),
        raw: None,
        report: None,
    })
}

#[expect(
    clippy::print_stdout,
    reason = "the figures are what this program is for"
)]
fn main() -> Done {
    let ring = KeyRing::parse(&KeyRing::file_text(&[7; 32]))?;
    let base = "https://t.brand.example";
    let signer = ring.signer(Tracker::host(base), None).ok_or("no key")?;
    let context = RenderContext {
        batch: BatchId::from_bytes([1; 16]),
        released_at: Timestamp::from_millis(1_763_712_300_007),
        tracker: Arc::new(Tracker::new(base, signer)?),
        mode: TrackingMode::Individual,
        proof: false,
    };
    let mut row = Row {
        name: Some("Ann".into()),
        prospect_id: Some("p-1".into()),
        vars: Some(r#"{"points":3}"#.into()),
        ..Row::new(0, "ann@x.example".parse()?)
    };
    let rsa = [dkim::Key::from_pem(
        "s1",
        &dkim::generate(dkim::Algorithm::Rsa2048)?,
    )?];
    let ed = [dkim::Key::from_pem(
        "s2",
        &dkim::generate(dkim::Algorithm::Ed25519)?,
    )?];
    for japanese in [false, true] {
        let content = Content::compile(&spec(newsletter(japanese))?)
            .map_err(|errors| format!("{errors:?}"))?;
        let size = content.render(&row, &context)?.size();
        let mut measure = |what: &str, times: u32, work: &mut dyn FnMut(&Row) -> Done| {
            let before = cpu_seconds();
            for index in 0..times {
                row.index = index;
                work(&row)?;
            }
            let micros = (cpu_seconds() - before) * 1e6 / f64::from(times);
            println!("{what:<24} {micros:>8.1} us of CPU ({size} bytes, japanese: {japanese})");
            Done::Ok(())
        };
        measure("check", 100_000, &mut |row| Ok(content.check(row)?))?;
        measure("render", 20_000, &mut |row| {
            std::hint::black_box(content.render(row, &context)?.into_bytes());
            Ok(())
        })?;
        for (what, times, keys) in [
            ("render + ed25519", 10_000, &ed),
            ("render + rsa2048", 1_000, &rsa),
        ] {
            measure(what, times, &mut |row| {
                let mut message = content.render(row, &context)?;
                message.sign("brand.example", keys, context.released_at)?;
                std::hint::black_box(message.into_bytes());
                Ok(())
            })?;
        }
    }
    Ok(())
}
