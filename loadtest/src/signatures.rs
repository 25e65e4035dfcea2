//! What bare RSA-2048 signatures cost here and now, to be taken off what the service needs.

use crate::process::of_this_thread;
use anyhow::{Context as _, Result, anyhow};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::RSA_PKCS1_SHA256;
use std::time::Duration;

/// Header fields of a usual message: what is signed is hashed first, so its size hardly matters.
const SIGNED: [u8; 512] = [b'x'; 512];

/// CPU time of one signature over half a KiB: the mean of `count` on each CPU, all CPUs at once, as
/// the service signs: a core that is busy all around is slower than one alone. Blocks.
///
/// # Errors
/// When the system gives no randomness, no threads or no CPU times.
pub fn rsa2048(count: u32) -> Result<Duration> {
    let key = KeyPair::generate(KeySize::Rsa2048).context("cannot make an RSA key")?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for _ in 0..cpus {
            let thread = std::thread::Builder::new().name("bare signing".to_owned());
            threads.push(thread.spawn_scoped(scope, || on_this_thread(&key, count.max(1)))?);
        }
        let mut sum = Duration::ZERO;
        let mut number = 0;
        for thread in threads {
            let one = thread
                .join()
                .map_err(|_| anyhow!("a signing thread died"))??;
            sum += one;
            number += 1;
        }
        Ok(sum / number.max(1))
    })
}

fn on_this_thread(key: &KeyPair, count: u32) -> Result<Duration> {
    let random = SystemRandom::new();
    let mut signature = vec![0; key.public_modulus_len()];
    let before = of_this_thread()?;
    for _ in 0..count {
        key.sign(&RSA_PKCS1_SHA256, &random, &SIGNED, &mut signature)
            .context("cannot sign")?;
        std::hint::black_box(&signature);
    }
    Ok(of_this_thread()?.saturating_sub(before) / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_takes_some_time() {
        let one = rsa2048(100).expect("signed");
        assert!(one > Duration::ZERO);
    }
}
