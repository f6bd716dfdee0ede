//! ARP and neighbour discovery for the addresses of Services that this node leads.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Result, ensure};
use weir::datapath::abi::{Announced, AnnouncedKey, Announcing, addr_of};

use super::frame::{POD_MAC, Packet, checksum, icmp, solicitation};
use super::world::{Arrival, MARK, Outcome, PASS, REDIRECT, World, settings, within};
use crate::require::require_lab;

/// Of the device, which is the loopback device here.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const RIVAL: [u8; 6] = [2, 0, 0, 0, 0, 8];
const IPV4: [u8; 4] = [203, 0, 113, 10];
const IPV6: &str = "2001:db8:cb::10";
const LOOPBACK: u32 = 1;

/// Rows for both addresses; how long the agent lives and leads, from now.
fn lead(world: &World, lives: Duration, leads: Duration) -> Result<()> {
    for address in [IpAddr::from(IPV4), IPV6.parse()?] {
        let key = AnnouncedKey { addr: addr_of(address), ifindex: LOOPBACK };
        world.datapath.typed("announced")?.insert(&key, &Announced { mac: MAC, ..Announced::default() })?;
    }
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
    let after = |time: Duration| (Duration::from(now) + time).as_nanos() as u64;
    let times = Announcing { until_ns: after(lives), led_until_ns: after(leads) };
    Ok(world.datapath.typed("announcing")?.insert(&0_u32, &times)?)
}

fn arp(operation: u8, from: ([u8; 6], [u8; 4]), to: ([u8; 6], [u8; 4])) -> Vec<u8> {
    [&[0, 1, 8, 0, 6, 4, 0, operation][..], &from.0, &from.1, &to.0, &to.1].concat()
}

fn frame(to: [u8; 6], from: [u8; 6], content: &[u8]) -> Vec<u8> {
    [&to[..], &from, &[0x08, 0x06], content].concat()
}

fn ask(world: &mut World, asked: [u8; 4]) -> Result<Outcome> {
    let question = arp(1, (POD_MAC, [192, 0, 2, 9]), ([0; 6], asked));
    world.send_bytes("from_network", &frame([0xff; 6], POD_MAC, &question), Arrival::default())
}

fn is_answered(world: &mut World) -> Result<bool> {
    let outcome = ask(world, IPV4)?;
    if outcome.action == PASS {
        return Ok(false);
    }
    ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
    let answer = arp(2, (MAC, IPV4), (POD_MAC, [192, 0, 2, 9]));
    assert_eq!(outcome.frame, frame(POD_MAC, MAC, &answer));
    Ok(true)
}

/// An advertisement of `target` by `mac`, as the programs write it.
fn advertisement(target: Ipv6Addr, to: Ipv6Addr, macs: ([u8; 6], [u8; 6]), flags: u8) -> Vec<u8> {
    let payload = [&target.octets()[..], &[2, 1], &macs.1].concat();
    let mut answer = icmp(target.into(), to.into(), 136, 0).payload(&payload);
    (answer.macs, answer.ttl) = (macs, 255);
    let mut bytes = answer.bytes();
    bytes[58] = flags;
    bytes[56..58].copy_from_slice(&[0, 0]);
    let words = bytes[22..54].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let check = checksum(&bytes[54..], u32::from(58_u8) + 32 + words.sum::<u32>());
    bytes[56..58].copy_from_slice(&check.to_be_bytes());
    bytes
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn the_leader_answers_arp_for_its_addresses_and_no_others() -> Result<()> {
    require_lab!();
    within(settings(), |world| {
        ensure!(!is_answered(world)?, "nobody leads yet");
        lead(world, LONG, LONG)?;
        ensure!(is_answered(world)?, "the leader answers");
        ensure!(ask(world, [203, 0, 113, 11])?.action == PASS, "another address is the stack's");
        // Gratuitous requests and answers are for the stack.
        for content in
            [arp(1, (POD_MAC, IPV4), ([0; 6], IPV4)), arp(2, (POD_MAC, [192, 0, 2, 9]), (MAC, IPV4))]
        {
            let outcome =
                world.send_bytes("from_network", &frame([0xff; 6], POD_MAC, &content), Arrival::default())?;
            ensure!(outcome.action == PASS, "{outcome:?}");
        }
        // An agent that is dead answers for nothing.
        lead(world, Duration::ZERO, Duration::ZERO)?;
        ensure!(!is_answered(world)?, "the agent is dead");
        Ok(())
    })
}

#[test]
fn the_leader_answers_neighbour_discovery_and_who_asks_whether_the_address_is_free() -> Result<()> {
    require_lab!();
    within(settings(), |world| {
        let (target, asker): (Ipv6Addr, Ipv6Addr) = (IPV6.parse()?, "2001:db8::9".parse()?);
        ensure!(world.send("from_network", &solicitation(asker, target))?.action == PASS);
        lead(world, LONG, LONG)?;
        let outcome = world.send("from_network", &solicitation(asker, target))?;
        ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
        assert_eq!(outcome.frame, advertisement(target, asker, (POD_MAC, MAC), 0x60));
        let outcome = world.send("from_network", &solicitation(Ipv6Addr::UNSPECIFIED, target))?;
        let all = ([0x33, 0x33, 0, 0, 0, 1], MAC);
        assert_eq!(outcome.frame, advertisement(target, "ff02::1".parse()?, all, 0x20));
        ensure!(outcome.action == REDIRECT, "{outcome:?}");
        // From beyond the link nobody is answered, and for other addresses the stack answers.
        let far = Packet { ttl: 254, ..solicitation(asker, target) };
        ensure!(world.send("from_network", &far)?.action == PASS);
        ensure!(world.send("from_network", &solicitation(asker, asker))?.action == PASS);
        Ok(())
    })
}

#[test]
fn who_leads_no_more_yields_to_a_rival_and_who_leads_does_not() -> Result<()> {
    require_lab!();
    within(settings(), |world| {
        let gratuitous = |mac| frame([0xff; 6], mac, &arp(1, (mac, IPV4), ([0; 6], IPV4)));
        lead(world, LONG, LONG)?;
        world.send_bytes("from_network", &gratuitous(RIVAL), Arrival::default())?;
        ensure!(is_answered(world)?, "a leader with a Lease does not yield");
        lead(world, LONG, Duration::ZERO)?;
        world.send_bytes("from_network", &gratuitous(MAC), Arrival::default())?;
        ensure!(is_answered(world)?, "its own announcement is no rival's");
        world.send_bytes("from_network", &gratuitous(RIVAL), Arrival::default())?;
        ensure!(!is_answered(world)?, "a leader without a Lease yields");

        let target: Ipv6Addr = IPV6.parse()?;
        let ask = solicitation("2001:db8::9".parse()?, target);
        ensure!(world.send("from_network", &ask)?.action == REDIRECT);
        let rival = advertisement(target, "ff02::1".parse()?, ([0x33, 0x33, 0, 0, 0, 1], RIVAL), 0x20);
        let outcome = world.send_bytes("from_network", &rival, Arrival::default())?;
        ensure!(outcome.action == PASS, "{outcome:?}");
        ensure!(world.send("from_network", &ask)?.action == PASS, "a leader without a Lease yields");
        Ok(())
    })
}
