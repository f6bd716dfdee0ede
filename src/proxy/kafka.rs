//! Kafka.
use tokio::net::TcpStream;

use super::session::Session;
use crate::model::l7::KafkaRule;

/// The rules of a set.
#[derive(Debug)]
pub struct KafkaRules(Vec<KafkaRule>);

impl KafkaRules {
    /// Of these rules.
    pub fn new(rules: &[KafkaRule]) -> Self {
        Self(rules.to_vec())
    }
}

/// Serves a connection.
pub async fn serve(_session: Session, _stream: TcpStream) {}
