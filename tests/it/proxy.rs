//! The proxy of layer 7 between real clients and servers, with a lookup and an agent's side of the tests' own.

mod dns;
mod http1;
mod http2;
mod tls;
mod world;
