//! Sequences: blocks come and go by orders, texts end where they should, halves have work for all.

use super::*;

fn admission(id: u32, prompt: usize, max_tokens: u32) -> Order {
    Order::Admit(Admission { id, request: id, prompt: vec![1; prompt], max_tokens, ..Admission::default() })
}

#[test]
fn blocks_come_back_when_rank_0_ends_a_sequence() {
    let mut sequences = Sequences::new(4, 64, vec![9]);
    assert_eq!(sequences.apply(admission(1, 20, 10)).expect("room"), None);
    assert_eq!(sequences.blocks(), (2, 4));
    sequences.apply(Order::Grant { sequence: 1, blocks: 1 }).expect("room");
    assert!(sequences.apply(admission(2, 20, 10)).is_err(), "one is left");
    let counted = sequences.sampled(1, 5).expect("it runs");
    assert_eq!((counted.token, counted.finish, counted.new), (5, None, true));
    let counted = sequences.sampled(1, 9).expect("it runs");
    assert_eq!((counted.token, counted.finish), (9, Some(FinishReason::Stop)));
    assert_eq!(sequences.sampled(1, 5), None, "it ended");
    assert_eq!(sequences.free(), 1);
    sequences.apply(Order::End(1)).expect("no blocks are needed");
    assert_eq!(sequences.free(), 4);
    assert_eq!((sequences.take_peak(), sequences.take_peak()), (3, 0), "asked again, it begins anew");
    sequences.check();
}

#[test]
fn both_halves_of_a_step_have_work_for_every_rank() {
    let mut sequences = Sequences::new(64, 64, vec![]);
    for id in 0..8 {
        let home = Rank(id as u16 % 4);
        let start = Admission { id, home, prompt: vec![1], max_tokens: 9, ..Admission::default() };
        sequences.apply(Order::Admit(start)).expect("room");
    }
    assert!(sequences.second_half().is_empty(), "nobody decodes yet");
    for id in 0..8 {
        sequences.sampled(id, 5).expect("it runs");
    }
    let second = sequences.second_half();
    for home in 0..4 {
        let of_home = [home, home + 4].iter().filter(|id| second.contains(id)).count();
        assert_eq!(of_home, 1, "of home {home}");
    }
    // One of each home: two homes each.
    (4..8).for_each(|id| drop(sequences.apply(Order::End(id))));
    assert_eq!(sequences.second_half(), BTreeSet::from([1, 3]));
    [1, 3].into_iter().for_each(|id| drop(sequences.apply(Order::End(id))));
    assert_eq!(sequences.second_half(), BTreeSet::from([2]), "whatever their homes");
}

#[test]
fn a_context_that_is_full_ends_a_sequence() {
    let mut sequences = Sequences::new(4, 32, vec![]);
    sequences.apply(admission(1, 32, 100)).expect("room");
    let counted = sequences.sampled(1, 5).expect("it runs");
    assert_eq!(counted.finish, Some(FinishReason::Length));
}

#[test]
fn who_is_preempted_comes_back_with_its_tokens() {
    let mut sequences = Sequences::new(4, 64, vec![]);
    sequences.apply(admission(1, 3, 10)).expect("room");
    for token in [5, 6] {
        sequences.sampled(1, token).expect("it runs");
    }
    let gone = sequences.apply(Order::Preempt(1)).expect("nothing is needed").expect("it ran");
    let again = Admission { id: 2, ..gone.again() };
    assert_eq!((&again.forced[..], again.told, again.request), (&[5, 6][..], 2, 1));
    sequences.apply(Order::Admit(again)).expect("room");
    // Its own tokens again, whatever is sampled this time; then new ones.
    let tokens: Vec<_> = [7, 7, 8].map(|t| sequences.sampled(2, t).expect("it runs")).to_vec();
    assert_eq!(
        tokens.iter().map(|c| (c.token, c.new)).collect::<Vec<_>>(),
        [(5, false), (6, false), (8, true)]
    );
}

#[test]
fn a_token_goes_on_unseen_only_where_nothing_but_its_id_is_unknown() {
    let mut sequences = Sequences::new(4, 64, vec![9]).remade_beyond(Some(20));
    sequences.apply(admission(1, 14, 10)).expect("room");
    sequences.sampled(1, 5).expect("it runs");
    assert!(sequences.goes_on(1, 14), "positions 14 and 15 are in its block");
    assert!(!sequences.goes_on(1, 13) && !sequences.goes_on(1, 15) && !sequences.goes_on(2, 14));
    sequences.sampled(1, 5).expect("it runs");
    assert!(!sequences.goes_on(1, 15), "it has no block for position 16");
    sequences.apply(Order::Grant { sequence: 1, blocks: 1 }).expect("room");
    assert!(sequences.goes_on(1, 15));
    (0..3).for_each(|_| assert!(sequences.sampled(1, 5).is_some()));
    assert!(sequences.goes_on(1, 18));
    sequences.sampled(1, 5).expect("it runs");
    assert!(!sequences.goes_on(1, 19), "21 tokens outgrow their keys");

    sequences.apply(admission(2, 3, 3)).expect("room");
    sequences.sampled(2, 5).expect("it runs");
    assert!(sequences.goes_on(2, 3));
    sequences.sampled(2, 5).expect("it runs");
    assert!(!sequences.goes_on(2, 4), "what is sampled there is the last");
    let forced =
        Admission { id: 3, prompt: vec![1], max_tokens: 9, forced: vec![7, 8], ..Admission::default() };
    sequences.apply(Order::Admit(forced)).expect("room");
    sequences.sampled(3, 5).expect("it runs");
    assert!(!sequences.goes_on(3, 1), "8 comes in place of what is sampled");
    sequences.sampled(3, 5).expect("it runs");
    assert!(sequences.goes_on(3, 2));
    sequences.sampled(3, 9).expect("it runs");
    assert!(!sequences.goes_on(3, 3), "it ended");
}

#[test]
fn who_sat_a_step_out_may_still_decode() {
    let mut sequences = Sequences::new(4, 64, vec![]);
    sequences.apply(admission(1, 3, 2)).expect("room");
    sequences.sampled(1, 5).expect("it runs");
    sequences.stepped(true);
    assert_eq!(sequences.decodable(), 0, "its last token is under way");
    sequences.sat_out(1);
    assert_eq!(sequences.decodable(), 1);
}
