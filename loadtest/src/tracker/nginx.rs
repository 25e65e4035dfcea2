//! nginx (Debian package `nginx-light`) that answers what the tracker does, as its users would set
//! it up: one worker for each CPU, a buffered access log.

use crate::process::{self, Guarded, Usage};
use crate::site;
use anyhow::{Context as _, Result};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(30);

/// A running nginx; ended when this is dropped, and its folder removed.
#[derive(Debug)]
pub(super) struct Nginx {
    process: Guarded,
    address: SocketAddr,
    _dir: TempDir,
}

impl Nginx {
    /// Starts it on any port, with a folder in `within`.
    ///
    /// # Errors
    /// When it does not come up.
    pub(super) async fn start(within: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("hikyaku-nginx-")
            .tempdir_in(within)?;
        let address = SocketAddr::from(([127, 0, 0, 1], site::free_port()?));
        let file = dir.path().join("nginx.conf");
        fs::write(&file, config(dir.path(), address))?;
        let child = Command::new("nginx")
            .arg("-p")
            .arg(dir.path())
            .arg("-c")
            .arg(&file)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("nginx (Debian: nginx-light)")?;
        let mut process = Guarded::new("nginx", child);
        let listening = async {
            while TcpStream::connect(address).await.is_err() {
                process.check()?;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            anyhow::Ok(())
        };
        let up = tokio::time::timeout(PATIENCE, listening).await;
        up.context("nginx does not listen")??;
        Ok(Self {
            process,
            address,
            _dir: dir,
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// CPU time of all its processes.
    pub(super) fn usage(&self) -> Result<Usage> {
        process::family(self.process.pid())
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // Its workers end only when the master tells them to.
        site::signal(self.process.pid(), "TERM").ok();
        self.process.child().wait().ok();
    }
}

fn config(dir: &Path, address: SocketAddr) -> String {
    let dir = dir.display();
    format!(
        "daemon off;\nuser root;\nworker_processes auto;\npid {dir}/pid;\nerror_log {dir}/error.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n  access_log {dir}/access.log combined buffer=64k flush=1s;\n\
         keepalive_requests 1000000000;\n  keepalive_timeout 300s;\n  tcp_nodelay on;\n\
         client_body_temp_path {dir}/body;\n  proxy_temp_path {dir}/proxy;\n\
         fastcgi_temp_path {dir}/fastcgi;\n  uwsgi_temp_path {dir}/uwsgi;\n  scgi_temp_path {dir}/scgi;\n\
         server {{\n    listen {address};\n\
         location /c/ {{ return 302 https://shop.example/offer/0?from=mail; }}\n\
         location /o/ {{ empty_gif; }}\n  }}\n}}\n"
    )
}
