//! Addresses that a stranger's DNS must not lead us to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether mail for the world cannot be meant for this address: this host, private and shared
/// networks, link-local (cloud metadata lives there), documentation, multicast, the rest that is
/// not global unicast.
pub(crate) fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => is_private_v4(address),
        IpAddr::V6(address) => is_private_v6(address),
    }
}

fn is_private_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    a == 0
        || a >= 240
        || address.is_loopback()
        || address.is_private()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_documentation()
        // Shared address space (RFC 6598), IETF protocols (RFC 6890), benchmarks (RFC 2544).
        || (a == 100 && (64..128).contains(&b))
        || (a, b, c) == (192, 0, 0)
        || (a == 198 && (b == 18 || b == 19))
}

fn is_private_v6(address: Ipv6Addr) -> bool {
    let first = address.segments()[0];
    // Global unicast is 2000::/3; in it, documentation (2001:db8::/32, 3fff::/20), Teredo and ORCHID
    // (2001::/23) and 6to4 (2002::/16) with the IPv4 address that it wraps.
    let [_, second, third, ..] = address.segments();
    match first {
        0x2001 => second < 0x0200 || second == 0x0db8,
        0x2002 => {
            let ([a, b], [c, d]) = (second.to_be_bytes(), third.to_be_bytes());
            is_private_v4(Ipv4Addr::new(a, b, c, d))
        }
        0x3fff => second < 0x1000,
        // NAT64 (RFC 6052): judged by what it leads to.
        0x0064 if second == 0xff9b => {
            let [a, b, c, d] = address.octets()[12..] else {
                return true;
            };
            is_private_v4(Ipv4Addr::new(a, b, c, d))
        }
        _ => !(0x2000..0x4000).contains(&first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_public_internet_is_public() {
        let private = [
            "127.0.0.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "192.0.2.1",
            "198.51.100.7",
            "203.0.113.9",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fd00::1",
            "fc00::1",
            "ff02::1",
            "2001:db8::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "2002:7f00:1::",
            "64:ff9b::a00:1",
            "2001::1",
            "100::1",
        ];
        for address in private {
            assert!(is_private(address.parse().expect(address)), "{address}");
        }
        for address in [
            "8.8.8.8",
            "100.128.0.1",
            "172.32.0.1",
            "2606:4700::1",
            "2a00:1450:4001::1",
            "64:ff9b::808:808",
            "2002:808:808::1",
        ] {
            assert!(!is_private(address.parse().expect(address)), "{address}");
        }
    }
}
