//! The `CNI_*` variables.

use std::path::PathBuf;

use super::{Attachment, Error, ErrorCode, Request, Result};
use crate::model::ObjectKey;

/// Longer ones no runtime has.
const ARGUMENTS_MAX: usize = 16 * 1024;

/// What the runtime wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

/// Reads variables by name; tests bring their own.
pub(super) struct Environment<F>(pub F);

impl<F: Fn(&str) -> Option<String>> Environment<F> {
    pub(super) fn command(&self) -> Result<Command> {
        match self.required("CNI_COMMAND")?.as_str() {
            "ADD" => Ok(Command::Add),
            "DEL" => Ok(Command::Del),
            "CHECK" => Ok(Command::Check),
            "GC" => Ok(Command::Gc),
            "STATUS" => Ok(Command::Status),
            "VERSION" => Ok(Command::Version),
            other => Err(invalid("CNI_COMMAND is none that we know").with_details(format!("{other:?}"))),
        }
    }

    /// The request of an ADD: with namespace and pod.
    pub(super) fn add(&self) -> Result<Request> {
        let mut request = self.check()?;
        let arguments = self.arguments()?;
        let (Some(namespace), Some(name)) = (arguments.namespace, arguments.name) else {
            return Err(invalid("CNI_ARGS names no pod: K8S_POD_NAMESPACE and K8S_POD_NAME are needed"));
        };
        request.pod = Some(ObjectKey::new(namespace, name));
        request.pod_uid = arguments.uid;
        request.validate()?;
        Ok(request)
    }

    /// The request of a CHECK: with namespace.
    pub(super) fn check(&self) -> Result<Request> {
        let netns = PathBuf::from(self.required("CNI_NETNS")?);
        let request = Request { netns: Some(netns), ..self.del()? };
        request.validate()?;
        Ok(request)
    }

    /// The request of a DEL: all that it takes is the attachment.
    pub(super) fn del(&self) -> Result<Request> {
        let container_id = self.required("CNI_CONTAINERID")?;
        let attachment = Attachment { container_id, interface: self.required("CNI_IFNAME")? };
        let request =
            Request { attachment, netns: None, pod: None, pod_uid: None, port_mappings: Vec::new() };
        request.validate()?;
        Ok(request)
    }

    fn required(&self, name: &str) -> Result<String> {
        match self.0(name) {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(invalid(format!("{name} is not set"))),
        }
    }

    fn arguments(&self) -> Result<Arguments> {
        let text = self.0("CNI_ARGS").unwrap_or_default();
        if text.len() > ARGUMENTS_MAX {
            return Err(invalid("CNI_ARGS is too long"));
        }
        let mut arguments = Arguments::default();
        let mut unknown = None;
        let mut ignores_unknown = false;
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(invalid("CNI_ARGS is no list of key=value"));
            };
            let field = match key {
                "K8S_POD_NAMESPACE" => &mut arguments.namespace,
                "K8S_POD_NAME" => &mut arguments.name,
                "K8S_POD_UID" => &mut arguments.uid,
                "K8S_POD_INFRA_CONTAINER_ID" => continue,
                "IgnoreUnknown" => {
                    ignores_unknown = matches!(value, "1" | "true" | "True" | "TRUE");
                    continue;
                }
                _ => {
                    unknown = Some(key);
                    continue;
                }
            };
            if !value.is_empty() && field.replace(value.to_owned()).is_some() {
                return Err(invalid(format!("CNI_ARGS has {key} twice")));
            }
        }
        match unknown {
            Some(key) if !ignores_unknown => {
                let shown: String = key.chars().take(64).collect();
                Err(invalid("CNI_ARGS has a key that we do not know, and no IgnoreUnknown=1")
                    .with_details(format!("{shown:?}")))
            }
            _ => Ok(arguments),
        }
    }
}

#[derive(Default)]
struct Arguments {
    namespace: Option<String>,
    name: Option<String>,
    uid: Option<String>,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidEnvironment, message)
}
