//! What can go wrong between ranks, always with who, where, why and what to do.

use crate::RoundId;
use crate::proto::membership::Refusal;
use crate::proto::round::Violation;
use exflow_placement::Rank;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Why nothing more comes from a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LossCause {
    /// It closed its end in order, after all that it had sent was delivered.
    #[error("it left the group")]
    Left,
    /// It, or the way to it, went silent.
    #[error("nothing was heard from it for {} ms", .after.as_millis())]
    Silent {
        /// The idle timeout that ran out.
        after: Duration,
    },
    /// It ended the connection and said why.
    #[error("it ended the connection: {reason}")]
    ClosedByPeer {
        /// Its words.
        reason: String,
    },
    /// Another process answers at its address and knows nothing of this connection.
    #[error("it was restarted")]
    Restarted,
    /// It is at rank 0's door and asks for the next epoch of the world.
    #[error("it asks to join again")]
    Rejoins,
    /// It is there and does not read what it is sent.
    #[error("it does not read: {waiting_bytes} bytes of messages wait for it (limit {limit_bytes})")]
    Unread {
        /// Bytes that wait, with those that found no room.
        waiting_bytes: usize,
        /// The most that may wait.
        limit_bytes: usize,
    },
    /// The driver below failed.
    #[error("{what}")]
    Other {
        /// The driver's words.
        what: String,
    },
}

/// Any failure of this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// A peer is gone whose data is needed.
    #[error("rank {rank}: rank {peer} is gone{}: {cause}; see its log, then start the group again", During(.round))]
    PeerLost {
        /// This rank.
        rank: Rank,
        /// The rank that is gone.
        peer: Rank,
        /// The round that waited for it.
        round: Option<RoundId>,
        /// Why it is gone.
        cause: LossCause,
    },
    /// A round took longer than its deadline; the peers are connected but did not send.
    #[error("rank {rank}: {round} is not complete after {} ms, missing from rank {}; \
             they may be stuck or slow (raise the round timeout if slow is right)",
            .waited.as_millis(), Ranks(.missing))]
    RoundTimeout {
        /// This rank.
        rank: Rank,
        /// The round.
        round: RoundId,
        /// Ranks whose frame is missing.
        missing: Vec<Rank>,
        /// Time since the round was started.
        waited: Duration,
    },
    /// A peer sent what the protocol does not allow.
    #[error("rank {rank}: rank {peer} broke the protocol{}: {violation}; run the same exflow everywhere", During(.round))]
    Protocol {
        /// This rank.
        rank: Rank,
        /// The rank that sent it.
        peer: Rank,
        /// The round that waited for it.
        round: Option<RoundId>,
        /// What it did.
        violation: Violation,
    },
    /// The peer answered our hello with a refusal.
    #[error("rank {rank}: rank {peer} refused us: {refusal}")]
    Refused {
        /// This rank.
        rank: Rank,
        /// The rank that refused.
        peer: Rank,
        /// Why.
        refusal: Refusal,
    },
    /// The group was not complete in time.
    #[error("rank {rank}: after {} ms rank {} had not joined; check that it runs, its address and UDP port{}",
            .waited.as_millis(), Ranks(.missing), Notes(.notes))]
    JoinTimeout {
        /// This rank.
        rank: Rank,
        /// Ranks that are missing.
        missing: Vec<Rank>,
        /// How long this rank waited.
        waited: Duration,
        /// Attempts that failed meanwhile, in words.
        notes: Vec<String>,
    },
    /// Rank 0 came to the conclusion that those who are there cannot be a world.
    #[error("the group cannot start: {what}")]
    NotStarted {
        /// Why.
        what: String,
    },
    /// The secure handshake with a peer failed.
    #[error(
        "rank {rank}: no trusted connection with rank {peer}: {cause}; \
             issue both identities from one authority with `exflow cert`"
    )]
    Untrusted {
        /// This rank.
        rank: Rank,
        /// The rank that was to be reached.
        peer: Rank,
        /// What the handshake said.
        cause: String,
    },
    /// The calling program asked for something that cannot be done.
    #[error("rank {rank}: {what}; this is a mistake of the calling program")]
    Misuse {
        /// This rank.
        rank: Rank,
        /// What was asked for.
        what: String,
    },
    /// The background stream towards a peer stays full.
    #[error("rank {rank}: {waiting_bytes} background bytes still wait for rank {peer} after {} ms (limit {limit_bytes}); \
             it is too slow or does not read them", .waited.as_millis())]
    Backlog {
        /// This rank.
        rank: Rank,
        /// The rank that does not keep up.
        peer: Rank,
        /// Bytes that wait.
        waiting_bytes: usize,
        /// The most that may wait.
        limit_bytes: usize,
        /// How long this rank waited for room.
        waited: Duration,
    },
    /// A certificate or key cannot be used.
    #[error("{}{what}; {remedy}", At(.path))]
    Identity {
        /// The file, where there is one.
        path: Option<PathBuf>,
        /// What is wrong with it.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// An option has a value that cannot work.
    #[error("{what}; {remedy}")]
    Options {
        /// The option and its value.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// The operating system refused a socket, a thread or an address.
    #[error("rank {rank}: {what}: {cause}")]
    System {
        /// This rank.
        rank: Rank,
        /// What was attempted.
        what: String,
        /// The system's words.
        cause: String,
    },
    /// This communicator has been shut down.
    #[error("rank {rank}: this communicator is closed; join the group again")]
    Closed {
        /// This rank.
        rank: Rank,
    },
}

struct During<'a>(&'a Option<RoundId>);

impl fmt::Display for During<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |round| write!(f, " in {round}"))
    }
}

struct Ranks<'a>(&'a [Rank]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, rank) in self.0.iter().enumerate() {
            write!(f, "{}{rank}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

struct Notes<'a>(&'a [String]);

impl fmt::Display for Notes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|note| write!(f, "; {note}"))
    }
}

struct At<'a>(&'a Option<PathBuf>);

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |path| write!(f, "{}: ", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ByteClass;

    #[test]
    fn a_lost_peer_is_told_with_round_layer_cause_and_remedy() {
        let round = Some(RoundId { number: 17, class: ByteClass::Dispatch, layer: 3 });
        let cause = LossCause::Silent { after: Duration::from_secs(3) };
        let text = TransportError::PeerLost { rank: Rank(0), peer: Rank(2), round, cause }.to_string();
        assert_eq!(
            text,
            "rank 0: rank 2 is gone in round 17 (dispatch, MoE layer 3): nothing was heard from it for 3000 ms; \
             see its log, then start the group again"
        );
    }
}
