//! Texts of peers for people who may not know whom they were about.
//!
//! A reply often repeats the recipient's address. Where it is shown as the trouble of a whole
//! destination it may be another account's, so the part before the at sign is left out.

/// `text` without local parts of addresses: `<***@x.example>`.
pub(crate) fn without_addresses(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('@') {
        let is_local = |c: char| {
            !c.is_whitespace()
                && !matches!(
                    c,
                    '<' | '>' | '(' | ')' | '[' | ']' | ':' | ';' | ',' | '"' | '\''
                )
        };
        let kept = before.trim_end_matches(is_local);
        shown.push_str(kept);
        if kept.len() < before.len() {
            shown.push_str("***");
        }
        shown.push('@');
        rest = after;
    }
    shown.push_str(rest);
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn local_parts_go_and_the_rest_stays() {
        for (text, shown) in [
            ("451 4.7.1 try later", "451 4.7.1 try later"),
            (
                "550 <a.b+c@x.example>: no such user",
                "550 <***@x.example>: no such user",
            ),
            (
                "550 a@x.example b@y.example",
                "550 ***@x.example ***@y.example",
            ),
            ("550 user:a@x.example;b@y", "550 user:***@x.example;***@y"),
            ("meet @ noon", "meet @ noon"),
            ("@@", "@@"),
            ("", ""),
        ] {
            assert_eq!(without_addresses(text), shown);
        }
    }

    proptest! {
        #[test]
        fn no_local_part_is_left(local in "[a-zA-Z0-9.+_=-]{1,20}", before in "[ <(]{1,3}", after in "[ >)]{0,3}") {
            let shown = without_addresses(&format!("550{before}{local}@x.example{after}"));
            prop_assert_eq!(shown, format!("550{before}***@x.example{after}"));
        }

        #[test]
        fn any_text_is_taken(text: String) {
            let once = without_addresses(&text);
            prop_assert_eq!(once.matches('@').count(), text.matches('@').count());
        }
    }
}
