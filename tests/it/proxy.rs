//! The proxy of layer 7 between real clients and servers, with a lookup and an agent's side of the tests' own.

mod http1;
mod world;
