//! A random number generator whose choices can be repeated: xorshift64*, from a seed.

#[derive(Debug)]
pub(crate) struct Dice {
    // Invariant: not zero.
    state: u64,
}

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        // The state is odd, so that it is not zero, even for the seed 0. The factor makes the choices of neighbouring
        // seeds differ soon.
        Self { state: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1 }
    }

    fn roll(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32
    }

    /// Returns a random number from 0 to less than `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    pub(crate) fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// Returns a random index of a sequence of this length.
    pub(crate) fn place(&mut self, length: usize) -> usize {
        usize::try_from(self.below(u64::try_from(length).unwrap())).unwrap()
    }
}
