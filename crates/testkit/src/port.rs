//! Ports of 127.0.0.1 for servers that tests start, each given to one test at a time.
//!
//! A port that was free a moment ago is not enough: before its server listens, or while it is
//! killed and started again, another test's server may be given it, or a client's connection may
//! leave from it. So these come from below what systems take for connections (RFC 6335 section 6:
//! from 49152; Linux: from 32768), and each belongs to its process until that ends.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::{Mutex, PoisonError};

/// The first that is given.
const FIRST: u16 = 12_000;
/// How many there are. A Redis Cluster also takes the port [`BUS`] above, so that is below 32768.
const COUNT: u16 = 10_000;
/// How far above its port a node of a Redis Cluster speaks to the others.
const BUS: u16 = 10_000;

/// Sockets whose abstract names (unix(7)) say whose the ports are. They go with the process,
/// however it ends.
static OWNED: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A port at which nobody listens, nor at the one 10,000 above; no other process that asks here is
/// given it while this one lives.
///
/// # Errors
/// When none is left, or no socket can be had.
pub fn free_port() -> io::Result<u16> {
    let first = fastrand::u16(..COUNT);
    for step in 0..COUNT {
        let port = FIRST + (first + step) % COUNT;
        if let Some(owned) = own(port)? {
            let mut all = OWNED.lock().unwrap_or_else(PoisonError::into_inner);
            all.push(owned);
            return Ok(port);
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// What says that a port is ours, if it is nobody's.
fn own(port: u16) -> io::Result<Option<UnixListener>> {
    let name = SocketAddr::from_abstract_name(format!("hikyaku-test-port-{port}"))?;
    let owned = match UnixListener::bind_addr(&name) {
        Ok(owned) => owned,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Ok(None),
        Err(error) => return Err(error),
    };
    let is_free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    Ok((is_free(port) && is_free(port + BUS)).then_some(owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_port_is_given_once() {
        let ports: Vec<_> = (0..100).map(|_| free_port().expect("a port")).collect();
        assert_eq!(ports.iter().collect::<HashSet<_>>().len(), 100);
        assert!(
            ports
                .iter()
                .all(|port| (FIRST..32_768 - BUS).contains(port))
        );
    }

    #[test]
    fn a_port_that_somebody_listens_at_is_not_given() {
        // Beside those that are given.
        let port = FIRST + COUNT;
        let busy = TcpListener::bind((Ipv4Addr::LOCALHOST, port + BUS)).expect("it is free");
        assert!(own(port).expect("a look").is_none());
        drop(busy);
        assert!(own(port).expect("a look").is_some());
    }
}
