use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Types of the layout: any bytes make one, and all of its bytes are initialised.
pub trait Plain: FromBytes + IntoBytes + Immutable + KnownLayout + Copy + 'static {}
impl<T: FromBytes + IntoBytes + Immutable + KnownLayout + Copy + 'static> Plain for T {}

/// The form in which aya takes keys and values.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Raw<T: Plain>(pub T);

// SAFETY: transparent over a type without padding or invalid bytes, which zerocopy's derives have checked.
unsafe impl<T: Plain> aya::Pod for Raw<T> {}
