//! A TUN device that outlives the process that reads it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::connection::{Connection, Request};
use super::link::{Link, delete_link, link};
use super::{Error, Result, get_sysctl, set_sysctl};

/// Of linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const IFF_TUN: libc::c_short = 0x0001;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;

/// What the reader of a TUN device takes from the kernel unfinished (`TUN_F_*` of linux/if_tun.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunOffload {
    /// Nothing: every packet is whole, with its checksums.
    None,
    /// Merged TCP packets of both families, and packets without their checksum.
    Tcp,
}

impl TunOffload {
    fn flags(self) -> libc::c_ulong {
        match self {
            Self::None => 0,
            // TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
            Self::Tcp => 1 | 2 | 4,
        }
    }
}

/// `struct ifreq` with flags.
#[repr(C)]
struct Ask {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// Makes the persistent device if there is none, with this MTU, without an address of its own, and sets it
/// up; its index. A device of another kind by that name goes.
pub fn ensure_tun(name: &str, mtu: u32) -> Result<u32> {
    let there = match link(name)? {
        Some(there) if there.kind == "tun" => Some(there),
        Some(_) => {
            delete_link(name)?;
            None
        }
        None => None,
    };
    if there.is_none() {
        let device = open(name)?;
        control(&device, TUNSETPERSIST, 1, "keeping the TUN device")?;
    }
    let found = link(name)?.ok_or_else(|| Error::Different(format!("device {name} went away")))?;
    raise(name, &found, mtu)?;
    Ok(found.index)
}

/// Takes the device: nobody else reads it while this descriptor is open. What is read and written has a
/// `struct virtio_net_hdr` of ten bytes in front.
pub fn take_tun(name: &str) -> Result<OwnedFd> {
    Ok(open(name)?.into())
}

/// Says what the reader does by itself.
pub fn set_tun_offload(device: &impl AsRawFd, offload: TunOffload) -> Result<()> {
    control(device, TUNSETOFFLOAD, offload.flags(), "setting what the TUN device leaves to its reader")
}

/// Sets MTU, no link-local address, and up: of any device without an Ethernet header.
pub(super) fn raise(name: &str, found: &Link, mtu: u32) -> Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = found.index;
    if found.mtu != mtu {
        message.attributes.push(LinkAttribute::Mtu(mtu));
        let request = Request::new(
            format!("setting the MTU of {name} to {mtu}"),
            RouteNetlinkMessage::SetLink(message.clone()),
        );
        Connection::open()?.execute(vec![request])?;
    }
    let generation = format!("net/ipv6/conf/{name}/addr_gen_mode");
    if get_sysctl(&generation)?.is_some() {
        set_sysctl(&generation, "1")?;
    }
    message.attributes.clear();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    let request = Request::new(format!("raising {name}"), RouteNetlinkMessage::SetLink(message));
    Connection::open()?.execute(vec![request])
}

/// Sets the device down.
pub(super) fn lower(name: &str, index: u32) -> Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask = LinkFlags::Up;
    let request = Request::new(format!("lowering {name}"), RouteNetlinkMessage::SetLink(message));
    Connection::open()?.execute(vec![request])
}

fn open(name: &str) -> Result<File> {
    let path = "/dev/net/tun";
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|cause| Error::kernel(format!("opening {path}"), cause))?;
    let mut ask = Ask { name: [0; libc::IFNAMSIZ], flags: IFF_TUN | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
    if name.len() >= ask.name.len() {
        return Err(Error::Different(format!("{name} is too long for a device's name")));
    }
    ask.name[..name.len()].copy_from_slice(name.as_bytes());
    take(&device, &mut ask).map_err(|cause| Error::kernel(format!("taking the TUN device {name}"), cause))?;
    Ok(device)
}

#[allow(unsafe_code)]
fn take(device: &File, ask: &mut Ask) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the kernel reads and writes one `struct ifreq`, which `ask` is.
    let outcome = unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, std::ptr::from_mut(ask)) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[allow(unsafe_code)]
fn control(device: &impl AsRawFd, request: libc::c_ulong, value: libc::c_ulong, action: &str) -> Result<()> {
    // SAFETY: the descriptor is open; these requests take a number and write no memory.
    let outcome = unsafe { libc::ioctl(device.as_raw_fd(), request, value) };
    if outcome == 0 { Ok(()) } else { Err(Error::kernel(action, io::Error::last_os_error())) }
}
