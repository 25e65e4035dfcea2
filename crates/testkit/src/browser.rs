//! A real Chromium (Debian package `chromium`), headless, driven by the DevTools protocol over its
//! pipe: no driver, no library, no port.
//!
//! It reaches the hosts that it is told, on loopback, and nothing else. Must not be used but by
//! tests.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// What a person's browser of that kind says; the headless one says that it is headless.
const USER_AGENT: &str = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36";
/// No look-ups, updates or reports of its own.
const QUIET: [&str; 14] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-sync",
    "--no-pings",
    "--metrics-recording-only",
];

/// A browser with one page. Dropping it ends it.
#[derive(Debug)]
pub struct Browser {
    _process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    _profile: tempfile::TempDir,
    session: String,
    calls: u64,
    /// Events that came while something else was waited for.
    events: Vec<Value>,
}

impl Browser {
    /// Starts one for which `hosts` are 127.0.0.1 and no other name is anything; it trusts
    /// certificates of the authority whose [`pin`](crate::tls::Issuer::pin) is given.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start(hosts: &[&str], pin: &str) -> Result<Self> {
        let profile = tempfile::tempdir()?;
        let mut rules: Vec<String> = hosts
            .iter()
            .map(|host| format!("MAP {host} 127.0.0.1"))
            .collect();
        rules.push("MAP * ~NOTFOUND".to_owned());
        rules.push("EXCLUDE 127.0.0.1".to_owned());
        // The pipe is file descriptors 3 and 4, which only a shell gives without unsafe code.
        let mut process = Command::new("sh")
            .args([
                "-c",
                "exec \"$0\" \"$@\" 3<&0 4>&1 0</dev/null 1>/dev/null 2>/dev/null",
            ])
            .arg("chromium")
            .args(QUIET)
            .arg("--remote-debugging-pipe")
            .arg(format!("--user-agent={USER_AGENT}"))
            .arg(format!("--host-resolver-rules={}", rules.join(",")))
            .arg(format!("--ignore-certificate-errors-spki-list={pin}"))
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .env("HOME", profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("chromium (test.sh installs it)")?;
        let to = process.stdin.take().context("a pipe")?;
        let from = BufReader::new(process.stdout.take().context("a pipe")?);
        let mut browser = Self {
            _process: process,
            to,
            from,
            _profile: profile,
            session: String::new(),
            calls: 0,
            events: Vec::new(),
        };
        let target = browser
            .call("Target.createTarget", json!({"url": "about:blank"}))
            .await?;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach).await?;
        let session = attached["sessionId"].as_str().context("a session")?;
        session.clone_into(&mut browser.session);
        browser.call("Page.enable", json!({})).await?;
        Ok(browser)
    }

    /// Opens an address and waits until the page is loaded.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub async fn open(&mut self, url: &str) -> Result<()> {
        self.events.clear();
        let opened = self.call("Page.navigate", json!({"url": url})).await?;
        ensure!(opened["errorText"].is_null(), "{url}: {opened}");
        self.event("Page.loadEventFired").await
    }

    /// Opens an HTML file as a program for mail would show it.
    ///
    /// # Errors
    /// As [`Browser::open`].
    pub async fn open_file(&mut self, path: &Path) -> Result<()> {
        self.open(&format!("file://{}", path.display())).await
    }

    /// Presses the mouse button on the first thing that `selector` finds, and waits for the page
    /// to which that leads.
    ///
    /// # Errors
    /// When there is no such thing, or it leads nowhere.
    pub async fn click(&mut self, selector: &str) -> Result<()> {
        let found = format!(
            "(() => {{ const e = document.querySelector({selector:?}); e.scrollIntoView(); \
             const r = e.getClientRects()[0]; return [r.left + r.width / 2, r.top + r.height / 2]; }})()"
        );
        let at = self.evaluate(&found).await?;
        self.events.clear();
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({
                "type": kind, "x": at[0], "y": at[1], "button": "left", "clickCount": 1,
            });
            self.call("Input.dispatchMouseEvent", event).await?;
        }
        self.event("Page.loadEventFired").await
    }

    /// What an expression gives in the page; a promise is waited for.
    ///
    /// # Errors
    /// When it throws.
    pub async fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let asked = json!({
            "expression": expression, "returnByValue": true, "awaitPromise": true,
        });
        let mut done = self.call("Runtime.evaluate", asked).await?;
        ensure!(done["exceptionDetails"].is_null(), "{expression}: {done}");
        Ok(done["result"]["value"].take())
    }

    /// The cookies that it would send to an address: name and value, with what else it knows.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn cookies(&mut self, url: &str) -> Result<Vec<Value>> {
        let asked = json!({"urls": [url]});
        let mut known = self.call("Network.getCookies", asked).await?;
        match known["cookies"].take() {
            Value::Array(cookies) => Ok(cookies),
            other => bail!("no list of cookies: {other}"),
        }
    }

    /// Calls a method of the protocol; its result.
    async fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.calls += 1;
        let mut call = json!({"id": self.calls, "method": method, "params": parameters});
        if !self.session.is_empty() {
            call["sessionId"] = json!(self.session);
        }
        self.to.write_all(format!("{call}\0").as_bytes()).await?;
        self.to.flush().await?;
        loop {
            let mut message = self.next().await?;
            if message["id"] == self.calls {
                ensure!(message["error"].is_null(), "{method}: {}", message["error"]);
                return Ok(message["result"].take());
            }
            self.events.push(message);
        }
    }

    /// Waits for an event, unless it came already.
    async fn event(&mut self, method: &str) -> Result<()> {
        if self.events.iter().any(|event| event["method"] == method) {
            return Ok(());
        }
        while self.next().await?["method"] != method {}
        Ok(())
    }

    async fn next(&mut self) -> Result<Value> {
        let mut bytes = Vec::new();
        let read = self.from.read_until(0, &mut bytes);
        let count = tokio::time::timeout(PATIENCE, read).await??;
        ensure!(count > 0, "the browser has ended");
        bytes.pop();
        Ok(serde_json::from_slice(&bytes)?)
    }
}
