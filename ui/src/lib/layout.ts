// Where the boxes of the map are: in columns, so that who asks is left of who answers, and within a
// column by namespace. Linear in boxes and lines but for a few sorts: 1,000 lines take milliseconds.

/** What must be placed. */
export interface Plan {
  boxes: readonly { id: string; namespace: string; edge?: 'left' | 'right' }[];
  /** Lines on which nothing passes do not say who is in front of whom. */
  lines: readonly { from: string; to: string; isDenied: boolean }[];
}

/** A rectangle by its upper left corner. */
export interface Place {
  x: number;
  y: number;
  width: number;
  height: number;
}

/** The boxes of one namespace in one column. */
export interface Block extends Place {
  id: string;
  namespace: string;
}

/** The places of a plan. */
export interface Placed {
  boxes: Map<string, Place>;
  blocks: Block[];
  width: number;
  height: number;
}

/** Size of a box, and the room around boxes and blocks. */
export const BOX = { width: 142, height: 40 };
const GAP = { box: 14, block: 26, column: 84, pad: 9, title: 22, margin: 16 };
/** More columns than this do not fit a screen; what comes later stays in the last one. */
const COLUMNS = 7;
/** A column with more boxes is split into two next to each other: more for a large map, which stays in shape. */
const tall = (boxes: number) => 18 + Math.floor(boxes / 12);

/** Places a plan; the same plan gives the same places, in whatever order it comes. `shape` is the width of the room by its height. */
export function place(plan: Plan, shape = 3): Placed {
  const boxes = [...plan.boxes].sort((a, b) => (a.id < b.id ? -1 : 1));
  const index = new Map(boxes.map((box, i) => [box.id, i]));
  const pairs = (lines: Plan['lines']) =>
    lines
      .map(({ from, to }) => [index.get(from), index.get(to)] as const)
      .filter((pair): pair is [number, number] => pair[0] !== undefined && pair[1] !== undefined && pair[0] !== pair[1])
      .sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const passing = pairs(plan.lines.filter((line) => !line.isDenied));
  const denied = pairs(plan.lines.filter((line) => line.isDenied));
  const rank = compact(flanks(boxes, besides(ranks(boxes.length, passing), passing, denied)));
  const columns = order(boxes, [...passing, ...denied], rank);
  const pieces = columns.flatMap((column) => split(column, tall(boxes.length)));
  // What is too flat for its room is spread over it, within reason.
  let placed = position(boxes, pieces, 1);
  for (const spread of [1.5, 2, 2.5, 3]) {
    if (placed.height * shape >= placed.width) break;
    placed = position(boxes, pieces, spread);
  }
  // Boxes in one row would hide the lines that pass them.
  return placed.height * shape * 2 < placed.width ? position(boxes, pieces, 3, BOX.height) : placed;
}

/** The column of every box: behind all that ask it, circles cut where they close. */
function ranks(count: number, edges: readonly [number, number][]): number[] {
  const out: number[][] = Array.from({ length: count }, () => []);
  const incoming = new Array<number>(count).fill(0);
  for (const [from, to] of edges) {
    out[from]!.push(to);
    incoming[to]! += 1;
  }
  const waiting = incoming.slice();
  const rank = new Array<number>(count).fill(0);
  const done = new Array<boolean>(count).fill(false);
  const ready = waiting.flatMap((n, i) => (n === 0 ? [i] : []));
  for (let left = count; left > 0; ) {
    const next = ready.pop() ?? entrance(done, waiting, out);
    if (done[next]) continue;
    done[next] = true;
    left -= 1;
    for (const to of out[next]!) {
      if (done[to]) continue;
      rank[to] = Math.min(Math.max(rank[to]!, rank[next]! + 1), COLUMNS - 1);
      waiting[to]! -= 1;
      if (waiting[to] === 0) ready.push(to);
    }
  }
  return rank;
}

/** Puts boxes that nothing passes from or to beside those that they have tried to reach. */
function besides(rank: number[], passing: readonly [number, number][], denied: readonly [number, number][]): number[] {
  const placed = new Set(passing.flat());
  // Without anything that passes, the attempts are all that there is.
  if (!placed.size) return ranks(rank.length, denied);
  for (const [from, to] of denied) {
    if (!placed.has(from) && placed.has(to)) rank[from] = Math.max(0, rank[to]! - 1);
    if (!placed.has(to) && placed.has(from)) rank[to] = Math.max(rank[to]!, Math.min(rank[from]! + 1, COLUMNS - 1));
  }
  for (const [from, to] of denied) if (!placed.has(from) && !placed.has(to)) rank[to] = Math.max(rank[to]!, rank[from]! + 1);
  return rank;
}

/** What is outside the cluster stands outside of what is inside. */
function flanks(boxes: readonly Named[], rank: readonly number[]): number[] {
  const inside = rank.filter((_, i) => !boxes[i]!.edge);
  const last = Math.max(0, ...inside) + 1;
  return rank.map((value, i) => (boxes[i]!.edge === 'left' ? 0 : boxes[i]!.edge === 'right' ? last : value));
}

/** Without empty columns. */
function compact(rank: readonly number[]): number[] {
  const used = [...new Set(rank)].sort((a, b) => a - b);
  return rank.map((value) => used.indexOf(value));
}

/** Where a circle is cut: at the box that fewest still ask, and that asks most. */
function entrance(done: readonly boolean[], waiting: readonly number[], out: readonly number[][]): number {
  let best = -1;
  for (let i = 0; i < done.length; i += 1) {
    if (done[i]) continue;
    const better = best < 0 || waiting[i]! < waiting[best]! || (waiting[i] === waiting[best] && out[i]!.length > out[best]!.length);
    if (better) best = i;
  }
  return best;
}

type Named = Plan['boxes'][number];

/** The boxes of every column, by namespace, and near to those that they are connected with. */
function order(boxes: readonly Named[], edges: readonly [number, number][], rank: readonly number[]): { namespace: string; members: number[] }[][] {
  const position = rank.map((_, i) => i);
  const near: number[][] = boxes.map(() => []);
  for (const [from, to] of edges) {
    near[from]!.push(to);
    near[to]!.push(from);
  }
  let columns: { namespace: string; members: number[] }[][] = [];
  for (let pass = 0; pass < 6; pass += 1) {
    const centre = near.map((others, i) => (others.length ? others.reduce((sum, other) => sum + position[other]!, 0) / others.length : position[i]!));
    columns = [];
    for (let column = 0; column < new Set(rank).size; column += 1) {
      const members = boxes.flatMap((_, i) => (rank[i] === column ? [i] : []));
      const blocks = group(members, (i) => boxes[i]!.namespace);
      const sorted = [...blocks].map(([namespace, list]) => {
        list.sort((a, b) => centre[a]! - centre[b]! || a - b);
        const middle = list.reduce((sum, i) => sum + centre[i]!, 0) / list.length;
        return { namespace, members: list, middle };
      });
      sorted.sort((a, b) => a.middle - b.middle || (a.namespace < b.namespace ? -1 : 1));
      const flat = sorted.flatMap((block) => block.members);
      // Columns are centred on each other: a position is the distance from the middle.
      flat.forEach((i, at) => (position[i] = at - (flat.length - 1) / 2));
      if (sorted.length) columns.push(sorted);
    }
  }
  return columns;
}

function group<T>(items: readonly T[], of: (item: T) => string): Map<string, T[]> {
  const groups = new Map<string, T[]>();
  for (const item of items) {
    const list = groups.get(of(item)) ?? [];
    list.push(item);
    groups.set(of(item), list);
  }
  return groups;
}

type Column = { namespace: string; members: number[] }[];

/** A column that is too high, as several; a block stays whole unless it alone is too high. */
function split(column: Column, most: number): Column[] {
  const pieces = column.flatMap(({ namespace, members }) =>
    Array.from({ length: Math.ceil(members.length / most) }, (_, i) => ({
      namespace,
      members: members.slice(i * most, (i + 1) * most),
    })),
  );
  const columns: Column[] = [[]];
  let height = 0;
  for (const piece of pieces) {
    if (height && height + piece.members.length > most) {
      columns.push([]);
      height = 0;
    }
    columns.at(-1)!.push(piece);
    height += piece.members.length + 1;
  }
  return columns;
}

function position(boxes: readonly Named[], columns: Column[], spread: number, stagger = 0): Placed {
  const [betweenBoxes, betweenBlocks] = [GAP.box * spread, GAP.block * spread];
  const blockHeight = (block: { namespace: string; members: number[] }) => {
    const rows = block.members.length;
    return 2 * GAP.pad + (block.namespace ? GAP.title : 0) + rows * BOX.height + (rows - 1) * betweenBoxes;
  };
  const places = new Map<string, Place>();
  const blocks: Block[] = [];
  const heights = columns.map((column) => column.reduce((sum, block) => sum + blockHeight(block) + betweenBlocks, -betweenBlocks));
  const height = Math.max(BOX.height, ...heights) + 2 * GAP.margin + 2 * stagger;
  columns.forEach((column, i) => {
    const x = GAP.margin + i * (BOX.width + 2 * GAP.pad + GAP.column);
    let y = (height - heights[i]!) / 2 + (i % 2 ? stagger : -stagger);
    for (const block of column) {
      const id = `${i}|${block.namespace}|${block.members[0]}`;
      blocks.push({ id, namespace: block.namespace, x, y, width: BOX.width + 2 * GAP.pad, height: blockHeight(block) });
      block.members.forEach((member, at) => {
        const top = y + GAP.pad + (block.namespace ? GAP.title : 0) + at * (BOX.height + betweenBoxes);
        places.set(boxes[member]!.id, { x: x + GAP.pad, y: top, ...BOX });
      });
      y += blockHeight(block) + betweenBlocks;
    }
  });
  const columnsWide = columns.length * (BOX.width + 2 * GAP.pad + GAP.column) - GAP.column;
  // Lines between boxes of the last column bend out of it.
  const width = columnsWide + 2 * GAP.margin + 40;
  return { boxes: places, blocks, width: Math.max(width, BOX.width), height };
}

/** The curve of a line between two places, and where its words stand: where no box covers them. */
export function curve(from: Place, to: Place): { path: string; x: number; y: number } {
  const y1 = from.y + from.height / 2;
  const y2 = to.y + to.height / 2;
  const n = (value: number) => Math.round(value * 10) / 10;
  if (to.x > from.x + from.width) {
    const [x1, x2] = [from.x + from.width, to.x];
    const bend = Math.min(Math.max((x2 - x1) / 2, 30), 160);
    const path = `M${n(x1)} ${n(y1)}C${n(x1 + bend)} ${n(y1)} ${n(x2 - bend)} ${n(y2)} ${n(x2)} ${n(y2)}`;
    // In the first gap between columns, where lines have parted.
    const wanted = Math.min((x1 + x2) / 2, x1 + GAP.column * 0.7);
    let t = 0.5;
    const along = (a: number, b: number, c: number, d: number) => (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t ** 2 * c + t ** 3 * d;
    for (let step = 0.25; step > 0.01; step /= 2) t += along(x1, x1 + bend, x2 - bend, x2) > wanted ? -step : step;
    return { path, x: n(wanted), y: n(along(y1, y1, y2, y2)) };
  }
  if (from === to) {
    const [x, y] = [from.x + from.width, y1];
    return { path: `M${n(x)} ${n(y - 8)}C${n(x + 44)} ${n(y - 30)} ${n(x + 44)} ${n(y + 30)} ${n(x)} ${n(y + 8)}`, x: n(x + 34), y: n(y) };
  }
  if (to.x + to.width < from.x) {
    const [x1, x2] = [from.x, to.x + to.width];
    const bend = Math.min(Math.max((x1 - x2) / 2, 30), 160);
    // A little lower than a line the other way, so that both can be seen.
    return { path: `M${n(x1)} ${n(y1 + 8)}C${n(x1 - bend)} ${n(y1 + 8)} ${n(x2 + bend)} ${n(y2 + 8)} ${n(x2)} ${n(y2 + 8)}`, x: n((x1 + x2) / 2), y: n((y1 + y2) / 2 + 8) };
  }
  const x = from.x + from.width;
  return { path: `M${n(x)} ${n(y1)}C${n(x + 60)} ${n(y1)} ${n(x + 60)} ${n(y2)} ${n(x)} ${n(y2)}`, x: n(x + 45), y: n((y1 + y2) / 2) };
}
