//! The protocol as state machines: no socket, no thread, no clock. Time is a `Duration` that the driver passes
//! in, counted from any moment it likes, and must not go backwards.

pub mod frame;
pub mod membership;
pub mod pulse;
pub mod round;
mod violation;
