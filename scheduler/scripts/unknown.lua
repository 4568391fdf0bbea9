-- Which tasks the queue does not have.
-- KEYS[1]  prefix of the namespace
-- ARGV     ids, some hundreds at most
-- reply    those without a task
local missing = {}
for _, id in ipairs(ARGV) do
  if redis.call('EXISTS', KEYS[1] .. ':task:' .. id) == 0 then
    missing[#missing + 1] = id
  end
end
return missing
