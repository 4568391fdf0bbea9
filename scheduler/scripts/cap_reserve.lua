-- Reserves the most that a request can count from a job's cap. Asking again with the same op changes nothing.
-- Of what a holder left that is not heard of any more its doubtful tokens are charged, and the rest comes back.
-- include: account
--
-- KEYS[1] state    hash    spent (tokens charged), held (sum of what is reserved), birth (names this memory: an op),
--                          gate (ms until which nothing is given), looking (set while somebody reads the spend logs),
--                          late (tokens of requests that ended meanwhile), batches (changes when a batch was noted in
--                          the dataset: an op)
-- KEYS[2] holders  zset    op -> when it counts as abandoned
-- KEYS[3] holds    hash    op -> "most doubtful"
-- KEYS[4] late     set     ops that were charged although nothing here remembered them
-- ARGV[1] op        string
-- ARGV[2] most      tokens, an upper bound
-- ARGV[3] doubtful  tokens that are charged where nobody knows what the request cost
-- ARGV[4] limit     tokens of the cap, less what batches were charged and the most that open ones can cost
-- ARGV[5] hold_ttl  ms without a sign of life after which a hold counts as abandoned
-- ARGV[6] logged    tokens that the job was charged but for batches, as the spend logs have it
-- ARGV[7] gate      ms for which a memory that is born now gives nothing, so that others can say what they hold
-- ARGV[8] seen      `batches` as it was before the caller looked which batches are open; '' before the first look
-- ARGV[9] fresh     '1' when the logs were read after a reply of -2
-- Reply: {1, spent, held, batches, birth} reserved | {0, spent, held, batches} others hold what is missing: ask again
--        {-1, spent, held, batches} it does not fit, whatever the others give back
--        {-2} no memory: read the spend logs | {-3, batches} look which batches are open

local op, most, doubtful = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local limit, hold_ttl = tonumber(ARGV[4]), tonumber(ARGV[5])
local seen = ARGV[8]

local state = {}
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do state[flat[i]] = flat[i + 1] end

if not state.spent then
  if ARGV[9] ~= '1' or not state.looking then
    redis.call('HSET', KEYS[1], 'looking', 1)
    keep()
    return {-2}
  end
  state.spent = tonumber(ARGV[6]) + tonumber(state.late or 0)
  state.birth = op
  state.held = state.held or 0
  state.gate = now + tonumber(ARGV[7])
  redis.call('HDEL', KEYS[1], 'looking', 'late')
  redis.call('HSET', KEYS[1], 'spent', whole(state.spent), 'held', whole(state.held), 'birth', op, 'gate', whole(state.gate))
  -- Who gave birth has looked since it found no memory; what was noted meanwhile would be here.
  if not state.batches then seen = op end
  keep()
end
local spent, held = tonumber(state.spent), tonumber(state.held)

if not state.batches then
  state.batches = op
  redis.call('HSET', KEYS[1], 'batches', op)
end
if redis.call('HEXISTS', KEYS[3], op) == 1 then return {1, spent, held, state.batches, state.birth} end
if seen ~= state.batches then return {-3, state.batches} end

for _, dead in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', whole(now), 'LIMIT', 0, 100)) do
  local their_most, their_doubtful = string.match(redis.call('HGET', KEYS[3], dead) or '0 0', '(%S+) (%S+)')
  spent, held = spent + tonumber(their_doubtful), held - tonumber(their_most)
  redis.call('ZREM', KEYS[2], dead)
  redis.call('HDEL', KEYS[3], dead)
end

-- Other servers may have been in use meanwhile. What is logged and not settled yet is among what is held, once a memory
-- that was born knows of all holds.
if now >= tonumber(state.gate or 0) then
  spent = math.max(spent, tonumber(ARGV[6]) - held)
end

local reply = {0, spent, held, state.batches}
if spent + most > limit then
  reply[1] = -1
elseif now >= tonumber(state.gate or 0) and spent + held + most <= limit then
  held = held + most
  redis.call('HSET', KEYS[3], op, whole(most) .. ' ' .. whole(doubtful))
  redis.call('ZADD', KEYS[2], whole(now + hold_ttl), op)
  reply = {1, spent, held, state.batches, state.birth}
end
redis.call('HSET', KEYS[1], 'spent', whole(spent), 'held', whole(held))
keep()
return reply
