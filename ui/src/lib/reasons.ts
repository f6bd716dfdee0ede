// Why packets are dropped, in words, and what to do about each. A test holds the names to those of
// src/flow/reason.rs.

/** A reason for people. */
export interface Reason {
  text: string;
  advice: string;
}

const REASONS: Record<string, Reason> = {
  POLICY_DENIED: {
    text: 'No policy allows it',
    advice: 'A policy isolates the pod and no rule allows this flow. If it should pass, apply the rule that would allow it.',
  },
  POLICY_DENY: {
    text: 'A deny rule forbids it',
    advice: 'A deny rule counts before every allow. Change the policy that is named, or the labels it selects.',
  },
  INVALID_SOURCE_IP: {
    text: "Source address is not the pod's",
    advice: 'The pod sends under an address that it was not given. Look for a VPN, a bridge or spoofing inside the pod.',
  },
  INVALID_PACKET_DROPPED: { text: 'Malformed packet', advice: 'The headers contradict each other. Capture at the sender.' },
  CT_TRUNCATED_OR_INVALID_HEADER: { text: 'Truncated header', advice: 'The packet ends within its headers. Capture at the sender.' },
  UNSUPPORTED_L3_PROTOCOL: { text: 'Unsupported network protocol', advice: 'Pods may send IPv4, IPv6 and ARP only.' },
  ERROR_WRITING_TO_PACKET: { text: 'Packet could not be rewritten', advice: 'The kernel refused a write. Report it with `weir sysdump`.' },
  UNKNOWN_L4_PROTOCOL: { text: 'Unknown transport protocol', advice: 'Only TCP, UDP, SCTP and ICMP can be judged. Use one of them.' },
  UNKNOWN_ICMPV4_CODE: { text: 'Unsupported ICMP message', advice: 'Echo and errors pass; this ICMP type does not.' },
  STALE_OR_UNROUTABLE_IP: {
    text: 'Nobody has this pod address',
    advice: 'The address is of a pod CIDR, and no pod has it. The client holds an old address: look at its DNS cache and at EndpointSlices.',
  },
  CT_MAP_INSERTION_FAILED: { text: 'Connection table is full', advice: 'Raise the size of the connections map (`weir map list` says how full).' },
  INVALID_IPV6_EXTENSION_HEADER: { text: 'Invalid IPv6 extension header', advice: 'Capture at the sender.' },
  IP_FRAGMENTATION_NOT_SUPPORTED: { text: 'Fragment cannot be handled', advice: "Lower the sender's packet size below the MTU." },
  SERVICE_BACKEND_NOT_FOUND: {
    text: 'Service has no ready backend',
    advice: "No pod behind the Service is ready. See `kubectl get endpointslices` and the pods' readiness probes.",
  },
  NO_TUNNEL_OR_ENCAPSULATION_ENDPOINT: {
    text: 'No tunnel to the node',
    advice: "The other pod's node is not known here. Is it ready, and does its agent run (`weir node list`)?",
  },
  UNSUPPORTED_L2_PROTOCOL: { text: 'Unsupported link protocol', advice: 'Pods may send IPv4, IPv6 and ARP only.' },
  NO_MAPPING_FOR_NAT_MASQUERADE: {
    text: 'No free port for masquerading',
    advice: 'Too many connections to one address of the world. Reuse connections, or give the node more addresses.',
  },
  FIB_LOOKUP_FAILED: { text: 'No route', advice: "The node has no route to the destination. See `ip route get` on the node." },
  ENCAPSULATION_TRAFFIC_IS_PROHIBITED: { text: 'Pods may not send tunnel packets', advice: "The destination port is the tunnel's. Use another UDP port." },
  INVALID_IDENTITY: { text: 'Invalid identity', advice: 'A tunnel packet names an identity that does not exist. Do all agents run one version?' },
  UNKNOWN_SENDER: { text: 'Unknown sender', advice: 'A tunnel packet comes from an address that is no node of the cluster. If it is a new node, does its agent run?' },
  IS_A_CLUSTERIP: { text: 'Not a port of this service', advice: 'The Service has the address, not this port. See `kubectl get service`.' },
  FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND: { text: 'First fragment was not seen', advice: "The first fragment was lost or denied. Lower the sender's packet size below the MTU." },
  FORBIDDEN_ICMPV6_MESSAGE: { text: 'Forbidden ICMPv6 message', advice: 'Pods may not send router messages: they could redirect other pods.' },
  DENIED_BY_LB_SRC_RANGE_CHECK: {
    text: "Outside of the Service's source ranges",
    advice: "The client's address is in none of the Service's loadBalancerSourceRanges. Add its range, if the client should get in.",
  },
  INVALID_VNI: { text: 'Tunnel packet with an invalid VNI', advice: "Another program uses the tunnel's port. Give Weir another port." },
  NO_PROXY: {
    text: 'No proxy takes what it must judge',
    advice: "A policy has rules of layer 7 for this port. The node's proxy is away or does not have the rules yet (`weir status`).",
  },
  DNS_UNASKED: {
    text: 'An answer of DNS that nobody asked for',
    advice: 'The answer is late (10 seconds), a second one, or forged: no question of the pod has its number, name and type.',
  },
  NO_EGRESS_GATEWAY: {
    text: 'No egress gateway is there for it',
    advice: 'A CiliumEgressGatewayPolicy selects the pod, and no node that it names is ready, or the gateway does not know the pod yet. See `weir egress list`.',
  },
  DROP_NO_EGRESS_IP: {
    text: 'Egress gateway lacks the address',
    advice: 'The gateway has no such egressIP, or no address of this family on the interface. See `weir egress list` on the gateway.',
  },
  UNENCRYPTED_TRAFFIC: {
    text: 'Came in plain and had to be encrypted',
    advice: "A node of the cluster, or somebody in its name, sends plain. Does its agent encrypt (`weir encryption status`)?",
  },
  TTL_EXCEEDED: { text: 'Time to live exceeded', advice: 'A loop of routes, or a traceroute.' },
  DROP_RATE_LIMITED: {
    text: 'Pod has its share of connections',
    advice: 'The pod holds as many connections as one pod may. See `weir endpoint list`; find the leak or raise the share.',
  },
  DROP_EP_NOT_READY: { text: "The pod's policy is not in force yet", advice: 'Normal for a moment after a start. If it stays, see `weir status`.' },
  NAT_PORT_QUOTA_EXCEEDED: {
    text: 'Pod has its share of ports for masquerading',
    advice: 'The pod holds as many ports to the world as one pod may. Reuse connections, or raise the share.',
  },
};

/** Names of all reasons that have words here. */
export const reasonNames = Object.keys(REASONS);

/** The words for a reason; an unknown one is shown by its name. */
export function reason(name: string): Reason {
  return (
    (Object.hasOwn(REASONS, name) ? REASONS[name] : undefined) ?? {
      text: name.toLowerCase().replaceAll('_', ' ').replace(/^./, (c) => c.toUpperCase()),
      advice: 'This page does not know the reason; see `weir observe --drop-reason` and the documentation.',
    }
  );
}

/** True when a policy decided. */
export function isPolicy(name: string): boolean {
  return name === 'POLICY_DENIED' || name === 'POLICY_DENY' || name === 'AUTH_REQUIRED';
}
