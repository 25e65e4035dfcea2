//! Chance that repeats: the keys of hash maps.
//!
//! The order of a `HashMap` and of the branches of `tokio::select!` hang on keys that the standard
//! library asks the system for, so the same seed would run otherwise each time. The library asks
//! through a weak symbol, made to be put in the place of; here it is, for this test program alone.
#![expect(
    unsafe_code,
    reason = "a symbol of libc is put in the place of, with raw memory as its argument"
)]

/// Asked for by who does not need it to be secret: `hashmap_random_keys`, and nobody else here.
const INSECURE: libc::c_uint = libc::GRND_INSECURE;

/// Keys of hash maps are always the same; what is to be secret comes from the kernel.
///
/// # Safety
/// As getrandom(2): `buffer` points to `length` bytes to be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(
    buffer: *mut libc::c_void,
    length: libc::size_t,
    flags: libc::c_uint,
) -> libc::ssize_t {
    if flags & INSECURE == 0 {
        // SAFETY: the caller's arguments, passed on to the call that they are meant for.
        let got = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
        return libc::ssize_t::try_from(got).unwrap_or(-1);
    }
    // SAFETY: the caller gives that many bytes to write to.
    unsafe { buffer.cast::<u8>().write_bytes(0x5a, length) };
    libc::ssize_t::try_from(length).unwrap_or(-1)
}

#[test]
fn hash_maps_have_the_same_keys_in_every_thread() {
    use std::collections::hash_map::RandomState;
    use std::hash::BuildHasher as _;
    let keys = || std::thread::spawn(|| RandomState::new().hash_one("order")).join();
    assert_eq!(keys().expect("a thread"), keys().expect("a thread"));
}
