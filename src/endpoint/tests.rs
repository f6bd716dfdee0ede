use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use super::*;
use crate::model::{Endpoint, EndpointId, ObjectKey};

fn attachment(container_id: &str, interface: &str) -> Attachment {
    Attachment { container_id: container_id.to_owned(), interface: interface.to_owned() }
}

fn endpoint(id: u16) -> Endpoint {
    let attachment = attachment(&format!("container-{id}"), "eth0");
    Endpoint {
        id: EndpointId(id),
        host_interface: host_interface_name(&attachment),
        host_ifindex: 7,
        mac: pod_mac(&attachment),
        port_mappings: Vec::new(),
        container_id: attachment.container_id,
        interface: attachment.interface,
        netns: PathBuf::from("/var/run/netns/cni-1"),
        pod: ObjectKey::new("shop", "web-0"),
        pod_uid: None,
        ipv4: Some(Ipv4Addr::new(10, 0, 1, 7)),
        ipv6: None,
    }
}

#[test]
fn names_of_devices_are_short_and_tell_attachments_apart() {
    let names =
        [attachment("a", "eth0"), attachment("a", "eth1"), attachment("ae", "th0"), attachment("b", "eth0")]
            .map(|attachment| host_interface_name(&attachment));
    for (place, name) in names.iter().enumerate() {
        assert_eq!(name.len(), 14);
        assert!(is_host_interface_name(name), "{name}");
        assert!(!names[..place].contains(name));
    }
    for other in ["weir_vxlan", "weir0123", "weir012345678g", "eth0", "weir0123456789a", "WEIR0123456789"] {
        assert!(!is_host_interface_name(other), "{other}");
    }
    let mac = pod_mac(&attachment("a", "eth0"));
    assert_eq!(mac.0[0] & 0b11, 0b10, "locally administered, of one station");
}

#[test]
fn what_is_stored_is_read_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Store::open(directory.path()).expect("opening");
    let (one, two) = (endpoint(1), endpoint(4095));
    store.write(&two).expect("writing");
    store.write(&one).expect("writing");
    let changed = Endpoint { pod_uid: Some("u".to_owned()), ..one };
    store.write(&changed).expect("writing over it");
    let again = Store::open(directory.path()).expect("opening again");
    assert_eq!(again.load().expect("loading"), [changed.clone(), two]);
    again.remove(EndpointId(4095)).expect("removing");
    again.remove(EndpointId(4095)).expect("removing again");
    assert_eq!(again.load().expect("loading"), [changed]);
}

#[test]
fn broken_files_are_set_aside_and_the_others_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Store::open(directory.path()).expect("opening");
    store.write(&endpoint(1)).expect("writing");
    let endpoints = directory.path().join("endpoints");
    fs::write(endpoints.join("2.json"), "{\"id\":2,").expect("a torn file");
    fs::write(endpoints.join("3.json"), "").expect("an empty file");
    fs::copy(endpoints.join("1.json"), endpoints.join("4.json")).expect("a copy under another name");
    fs::write(endpoints.join(".5"), "half").expect("a write that was interrupted");
    assert_eq!(store.load().expect("loading"), [endpoint(1)]);
    let mut left: Vec<_> = fs::read_dir(&endpoints)
        .expect("listing")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    left.sort();
    assert_eq!(left, [".5", "1.json", "2.broken", "3.broken", "4.broken"]);
}
