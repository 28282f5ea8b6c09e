// A (token, expert) pair that this device works on, sorted by expert.
struct Pair {
    row: u32,    // row of the normed input
    slot: u32,   // row of the partial that it becomes
    weight: f32, // router weight
    expert: u32, // local expert, counted over the experts on this device
}

// Up to TILE_ROWS pairs of one expert: pairs[first .. first + count].
struct Tile {
    expert: u32,
    first: u32,
    count: u32,
    _pad: u32,
}
