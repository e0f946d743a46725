//! Services and EndpointSlices turned into frontends, backends and the ordered writes that bring a table from one state to the next.
#![forbid(unsafe_code)]

pub mod model;
