//! What gives flows their names.

use std::sync::Arc;

use super::Known;
use crate::flow::{Direction, NameSource, NameTables};
use crate::model::l7::RuleSetId;
use crate::model::{EndpointId, IdentityId, IdentityLabels, LocalIdentity, MatchType, Origins};

impl NameSource for Known {
    fn tables(&self) -> NameTables {
        NameTables {
            endpoints: self.endpoints.snapshot(),
            node_endpoints: self.tables.node_endpoints.snapshot(),
            services: self.tables.services.snapshot(),
        }
    }

    fn identity(&self, id: IdentityId) -> Option<Arc<IdentityLabels>> {
        self.tables.identities.get(&id)
    }

    fn local_identity(&self, id: IdentityId) -> Option<LocalIdentity> {
        self.current.load().local_identities.get(&id).cloned()
    }

    fn rule_origin(&self, rule_id: u32) -> Option<Origins> {
        self.loaded.get()?.rule_origins.get(rule_id)
    }

    fn rule_set_origin(&self, id: RuleSetId) -> Option<Origins> {
        Some(self.loaded.get()?.rule_sets.get(id)?.origins)
    }

    fn is_audit(&self, rule_id: u32) -> bool {
        rule_id != 0 && self.loaded.get().is_some_and(|loaded| loaded.rule_origins.is_audit(rule_id))
    }

    fn match_type(&self, rule_id: u32) -> MatchType {
        self.loaded.get().map_or(MatchType::None, |loaded| loaded.rule_origins.match_type(rule_id))
    }

    fn isolating(&self, endpoint: EndpointId, direction: Direction) -> Origins {
        let current = self.current.load();
        let Some([ingress, egress]) = current.isolated_by.get(&endpoint) else { return Origins::default() };
        match direction {
            Direction::Egress => egress.clone(),
            _ => ingress.clone(),
        }
    }
}
