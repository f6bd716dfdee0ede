//! The kernel side's other half: loads the programs, owns the maps.
#![allow(unsafe_code)]

pub mod skeleton;
