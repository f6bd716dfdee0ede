use proptest::prelude::*;

use super::*;

fn cidrs(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().expect("a CIDR")).collect()
}

fn pair(ipv4: &str, ipv6: &str) -> Addresses {
    Addresses { ipv4: Some(ipv4.parse().expect("IPv4")), ipv6: Some(ipv6.parse().expect("IPv6")) }
}

#[test]
fn both_families_begin_behind_the_nodes_own() {
    let mut ipam = Ipam::new(&cidrs(&["10.0.1.0/24", "fd00:1::/64"]), []);
    assert_eq!(ipam.allocate(), Ok(pair("10.0.1.2", "fd00:1::2")));
    assert_eq!(ipam.allocate(), Ok(pair("10.0.1.3", "fd00:1::3")));
}

#[test]
fn host_bits_of_a_cidr_do_not_matter() {
    let mut ipam = Ipam::new(&cidrs(&["10.0.1.77/24"]), []);
    assert_eq!(ipam.allocate().map(|given| given.ipv4), Ok(Some(Ipv4Addr::new(10, 0, 1, 2))));
}

#[test]
fn a_freed_address_is_the_last_to_be_given_again() {
    let mut ipam = Ipam::new(&cidrs(&["10.0.1.0/29"]), []);
    let mut given: Vec<u8> = Vec::new();
    for _ in 0..10 {
        let addresses = ipam.allocate().expect("there are free ones");
        let address = addresses.ipv4.expect("the node has IPv4");
        given.push(address.octets()[3]);
        ipam.release([IpAddr::V4(address)]);
    }
    assert_eq!(given, [2, 3, 4, 5, 6, 2, 3, 4, 5, 6]);
}

#[test]
fn after_a_restart_it_goes_on_behind_the_highest_in_use() {
    let used = ["10.0.1.2", "10.0.1.9", "fd00:1::5"].map(|text| text.parse().expect("an address"));
    let mut ipam = Ipam::new(&cidrs(&["10.0.1.0/24", "fd00:1::/64"]), used);
    assert_eq!(ipam.allocate(), Ok(pair("10.0.1.10", "fd00:1::6")));
}

#[test]
fn exhaustion_names_the_cidr_and_keeps_nothing() {
    let mut ipam = Ipam::new(&cidrs(&["10.0.1.0/24", "fd00:1::/126"]), []);
    assert_eq!(ipam.allocate(), Ok(pair("10.0.1.2", "fd00:1::2")));
    assert_eq!(ipam.allocate(), Ok(pair("10.0.1.3", "fd00:1::3")));
    let error = ipam.allocate().expect_err("IPv6 is full");
    assert_eq!(error.to_string(), "every address of fd00:1::/126 is in use");
    assert!(!ipam.is_used("10.0.1.4".parse().expect("an address")));
}

#[test]
fn a_second_cidr_takes_over() {
    let mut ipam = Ipam::new(&cidrs(&["10.0.1.0/30", "10.0.2.0/30"]), []);
    let given: Vec<_> = (0..2).map(|_| ipam.allocate().expect("there are two").ipv4).collect();
    assert_eq!(given, [Some(Ipv4Addr::new(10, 0, 1, 2)), Some(Ipv4Addr::new(10, 0, 2, 2))]);
    let error = ipam.allocate().expect_err("both are full");
    assert_eq!(error.to_string(), "every address of 10.0.1.0/30 and 10.0.2.0/30 is in use");
}

#[test]
fn cidrs_too_small_for_a_pod_are_full_from_the_start() {
    for text in ["10.0.1.0/31", "10.0.1.0/32", "fd00::/127", "fd00::/128"] {
        let all = cidrs(&[text]);
        assert_eq!(Ipam::new(&all, []).allocate(), Err(Error::Exhausted(all)), "{text}");
    }
    assert_eq!(Ipam::new(&[], []).allocate(), Err(Error::NoCidr));
}

#[test]
fn other_cidrs_leave_addresses_in_use_alone() {
    let mut ipam = Ipam::new(&cidrs(&["10.0.1.0/24"]), []);
    let first = ipam.allocate().expect("it is empty");
    ipam.set_pod_cidrs(&cidrs(&["10.0.0.0/16"]));
    let all: HashSet<_> = (0..2000).map(|_| ipam.allocate().expect("it is large").ipv4).collect();
    assert_eq!(all.len(), 2000);
    assert!(!all.contains(&first.ipv4));
}

#[test]
fn the_largest_cidrs_do_not_overflow() {
    let used = ["10.255.255.254", "fd00::ffff:ffff"].map(|text| text.parse().expect("an address"));
    let mut ipam = Ipam::new(&cidrs(&["0.0.0.0/0", "fd00::/8"]), used);
    assert!(ipam.allocate().is_ok());
    assert_eq!(ipam.allocate().map(|given| given.ipv6), Ok(Some("fd00::3".parse().expect("IPv6"))));
}

proptest! {
    /// Whatever is allocated, released and restarted, nobody is given what somebody has.
    #[test]
    fn an_address_in_use_is_never_given(
        lengths in (26u8..=30, 122u8..=126),
        steps in prop::collection::vec((0u8..4, any::<prop::sample::Index>()), 1..200),
    ) {
        let cidrs = cidrs(&[&format!("10.0.1.0/{}", lengths.0), &format!("fd00::/{}", lengths.1)]);
        let mut ipam = Ipam::new(&cidrs, []);
        let mut pods: Vec<Addresses> = Vec::new();
        for (step, pick) in steps {
            match step {
                0 | 1 => if let Ok(given) = ipam.allocate() {
                    let (ipv4, ipv6) = (given.ipv4.expect("IPv4"), given.ipv6.expect("IPv6"));
                    prop_assert!(pods.iter().all(|pod| pod.ipv4 != given.ipv4 && pod.ipv6 != given.ipv6));
                    prop_assert!(cidrs[0].contains(&IpAddr::V4(ipv4)) && cidrs[1].contains(&IpAddr::V6(ipv6)));
                    let IpNet::V4(range) = cidrs[0] else { unreachable!() };
                    prop_assert!(ipv4 != range.network() && ipv4 != range.broadcast());
                    prop_assert!(ipv4.octets()[3] != 1 && ipv6.segments()[7] > 1);
                    pods.push(given);
                },
                2 if !pods.is_empty() => {
                    let pod = pods.swap_remove(pick.index(pods.len()));
                    ipam.release(pod.ipv4.map(IpAddr::V4).into_iter().chain(pod.ipv6.map(IpAddr::V6)));
                }
                3 => {
                    let used = pods.iter().flat_map(|pod| {
                        [pod.ipv4.map(IpAddr::V4), pod.ipv6.map(IpAddr::V6)].into_iter().flatten()
                    });
                    ipam = Ipam::new(&cidrs, used.collect::<Vec<_>>());
                }
                _ => {}
            }
        }
        for pod in &pods {
            prop_assert!(pod.ipv4.is_some_and(|ipv4| ipam.is_used(IpAddr::V4(ipv4))));
        }
    }
}
